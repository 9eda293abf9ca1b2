"""The way to the providers: `routing.Router` chooses, the other two modules speak to them."""
