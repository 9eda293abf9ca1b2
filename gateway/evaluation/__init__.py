"""`holdgate judge eval` and `holdgate judge fit`: how far judges can be trusted, measured on people's labels."""
