r"""What is said to whoever grades an answer: the patterns that `precheck` looks for.

They are RE2 patterns: `\b` and `\w` know ASCII only, `\pL` is any letter, and none needs more than linear time. Each holds several
parts of such a message at once (who is meant, what is graded, the grade that is wanted), since answers also speak of grades,
judges and instructions without speaking to a grader.
"""

from __future__ import annotations

from collections.abc import Iterator

from validators.scan import Rule

#: Words by language: to ignore; instructions; this answer; who grades; what a good grade is. Stems where words are inflected,
#: imperatives where the same verb is common in telling.
_WORDS = (
    (
        r"(?:^|[.!?:;\n\"'“”(\[>*_#-]\s*|\b(?:and|now|please|kindly|then) )(?:ignore|disregard|forget|override|overrule|bypass|neglect|set aside|pay no attention to)\b",
        r"(?:\b(?:all|any|previous|prior|earlier|above|your|given|system)\b[^\n]{0,30}\b(?:instructions?|criteria|guidelines?|prompt|rules)\b|\b(?:rubric|grading|scoring)\b)",
        r"\b(?:this|the above|the present) (?:answer|response|reply|submission|output|candidate|solution|text|message|one|item)\b",
        r"\b(?:grader|judge|evaluator|assessor|examiner|scorer|marker|checker|rater|(?:scoring|grading|marking|evaluation) model|reviewers?|review systems?)\b",
        r"(?:\bfull (?:marks|points|score|credit)\b"
        r"|\b(?:maximum|max|highest|top|best|perfect|passing)(?: possible)? (?:scores?|marks?|grades?|labels?|points|ratings?)\b"
        r"|\bten out of ten\b|\bfive (?:out of five|points)\b|\b(?:10|5|100)/(?:10|5|100)\b|\bas (?:fully |being )?(?:correct|acceptable|supported|perfect)\b"
        r"|\b(?:says?|answers?|prints?|output|return|reply|label|word)s? (?:is |only |with )?[\"'“]?(?:yes|pass)\b[\"'”]?(?:[.!,;]|\s*$)|\bpasses everything\b)",
    ),
    (
        r"(?:ignorier|missacht|vergiss|vergesst|übergeh)",
        r"(?:anweisung|instruktion|vorgabe|kriteri|bewertungsregel)",
        r"(?:diese[rsn]? antwort|diese lösung)",
        r"(?:prüfer|gutachter|korrektor|bewerter|bewertungsmodell|bewertungssystem)",
        r"(?:als (?:richtig|korrekt)|volle punkt|höchste (?:punkt|note|bewertung)|maximale punkt|bestnote|kriterium mit ja|immer (?:mit )?ja)",
    ),
    (
        r"(?:ignore[zr]?|oublie[zr]?|néglige[zr]?|ne ten(?:ez|s) pas compte)",
        r"(?:instructions|consignes|directives|critères)",
        r"(?:cette réponse|la réponse ci-dessus)",
        r"(?:correcteur|évaluateur|examinateur|juge)",
        r"(?:comme (?:étant )?correcte|(?:note|score) maxim|tous les points|meilleure note|réponds oui|répondez oui)",
    ),
    (
        r"(?:ignor[ae]|olvida|descarta|haz caso omiso)",
        r"(?:instrucciones|criterios|indicaciones)",
        r"(?:esta respuesta|la respuesta anterior)",
        r"(?:evaluador|calificador|corrector|examinador|juez)",
        r"(?:como correcta|puntuación máxima|máxima puntuación|nota máxima|mejor nota|responde (?:que )?sí)",
    ),
    (
        r"(?:ignor[ai]|dimentica|trascura)",
        r"(?:istruzioni|criteri|indicazioni)",
        r"(?:questa risposta|la risposta precedente)",
        r"(?:valutatore|esaminatore|correttore|giudice)",
        r"(?:come corretta|punteggio massimo|massimo punteggio|voto massimo|pieni voti|rispondi (?:di )?sì)",
    ),
    (
        r"(?:ignore|esqueça|desconsidere)",
        r"(?:instruções|critérios|orientações)",
        r"(?:esta resposta|essa resposta|a resposta acima)",
        r"(?:avaliador|corretor|examinador|juiz)",
        r"(?:como corret[ao]|nota máxima|pontuação máxima|responda sim)",
    ),
    (
        r"(?:negeer|vergeet)",
        r"(?:instructies|aanwijzingen|criteria)",
        r"(?:dit antwoord|deze oplossing)",
        r"(?:beoordelaar|examinator|corrector)",
        r"(?:als (?:juist|correct|goed)|maximale score|hoogste (?:score|cijfer)|volle punten)",
    ),
    (
        r"(?:zignoruj|zapomnij|pomiń)",
        r"(?:instrukcj|poleceni|kryteri)",
        r"(?:tę odpowiedź|tej odpowiedzi|ta odpowiedź)",
        r"(?:oceniając|egzaminator|sędzi)",
        r"(?:jako (?:poprawn|prawidłow)|maksymaln\pL* (?:punkt|ocen|liczb)|najwyższ\pL* ocen)",
    ),
    (
        r"(?:игнориру|забуд|не обращай)",
        r"(?:инструкци|указани|критери)",
        r"(?:эт\pL+ ответ)",
        r"(?:проверяющ|оценщик|экзаменатор|эксперт|судь)",
        r"(?:как (?:правильн|верн)|максимальн\pL+ (?:балл|оценк)|высш\pL+ (?:балл|оценк)|ответь да)",
    ),
    (
        r"(?:忽略|无视|忘记|不要理会)",
        r"(?:指令|指示|说明|评分标准|规则)",
        r"(?:[此这本](?:个|条)?(?:答案|回答|回复))",
        r"(?:评分者|评委|评审|阅卷|裁判|打分)",
        r"(?:评为正确|为正确|满分|最高分|视为正确|回答是)",
    ),
    (
        r"(?:無視|忘れ)",
        r"(?:指示|命令|指令|採点基準)",
        r"(?:この(?:回答|答え|解答|応答))",
        r"(?:採点者|評価者|審査員|採点モデル)",
        r"(?:正解と|満点|最高点|正しいと|合格と)",
    ),
    (
        r"(?:무시|잊어)",
        r"(?:지시|명령|지침|기준)",
        r"(?:이 (?:답변|응답|답안))",
        r"(?:채점자|평가자|심사위원)",
        r"(?:정답으로|만점|최고점|맞는 것으로|합격)",
    ),
    (
        r"(?:تجاهل|انس)",
        r"(?:التعليمات|الإرشادات|المعايير)",
        r"(?:هذه الإجابة|هذا الجواب|هذا الرد)",
        r"(?:المصحح|المقيّم|المقيم|الحكم)",
        r"(?:على أنها صحيحة|صحيحة|الدرجة الكاملة|أعلى درجة|العلامة الكاملة)",
    ),
    (
        r"(?:yok say|görmezden gel|unut)",
        r"(?:talimat|yönerge|kriter)",
        r"(?:bu (?:cevab|yanıt))",
        r"(?:değerlendirici|puanlayıcı|hakem)",
        r"(?:doğru olarak|tam puan|en yüksek puan)",
    ),
    (
        r"(?:अनदेखा|नज़रअंदाज़|भूल जा)",
        r"(?:निर्देश|मानदंड)",
        r"(?:इस (?:उत्तर|जवाब))",
        r"(?:परीक्षक|मूल्यांकनकर्ता|जाँचकर्ता)",
        r"(?:सही मान|पूरे अंक|पूर्ण अंक|अधिकतम अंक)",
    ),
    (
        r"(?:ignorera|bortse från|glöm)",
        r"(?:instruktion|anvisning|kriteri)",
        r"(?:det här svaret|detta svar)",
        r"(?:bedömare|granskare|examinator)",
        r"(?:som (?:korrekt|rätt)|full poäng|högsta (?:poäng|betyg))",
    ),
    (
        r"(?:bỏ qua|phớt lờ|quên)",
        r"(?:hướng dẫn|chỉ dẫn|tiêu chí)",
        r"(?:câu trả lời này|đáp án này)",
        r"(?:người chấm|giám khảo)",
        r"(?:là đúng|điểm tối đa)",
    ),
    (
        r"(?:abaikan|lupakan)",
        r"(?:instruksi|petunjuk|kriteria)",
        r"(?:jawaban ini|tanggapan ini)",
        r"(?:penilai|penguji|juri)",
        r"(?:sebagai benar|nilai (?:penuh|maksimum)|skor maksimum)",
    ),
)

#: The start of a sentence, a line or a quotation: where an imperative stands.
_START = (
    r"(?:^|[.!?:;\n\"'“”(\[>*_#-]\s*|\bthen |[。！？：，,]\s*)"
    r"(?:(?:please|kindly|now|first|just|simply|and|also) )*"
)
_WHO = (
    r"(?:graders?|judges?|evaluators?|evaluation model|assessors?|examiners?|scorers?|scoring model|checkers?"
    r"|markers?|raters?|reviewers?(?: bot)?|eval\w*gpt)"
)
_GOOD = (
    r"(?:yes|pass(?:es|ed)?|correct|accept(?:ed|able)?|approved?|supported|success|perfect|excellent|flawless"
    r"|full|max|maximum|highest|top|best|positive|passing|five|ten|5|10|100|a\+?)"
)
#: A bare yes; `yes or no` and `yes if` leave the choice open.
_YES = r"[\"'“]?\b(?:yes|pass|accept|ok)\b[\"'”]?(?:\s*[.!;,)\]\n{]|\s*$| (?:for|to|on|no|regardless|whatever|behind|and)\b)"
_ANSWER = (
    r"(?:(?:this|that|the|my|above) (?:answer|response|reply|one|item|submission|output|candidate|solution|text)"
    r"|the above|this|that|it|what you \w+)"
)
_ANY = r"(?:every|all|each|any|no matter|whatever|always|everything)"
_GIVE = r"(?:give|award|assign|grant|output|print|return|report|reply|respond|answer|say|choose|select|write)"
_GRADED = r"(?:rate|mark|grade|score|label|evaluate|judge|treat|count|consider|accept|classify)(?:e?d|led)?"
_LABEL = r"(?:label|verdict|grade|rating|score|points|evaluation|assessment|grading)s?"

#: Ways of speaking to a grader in English: name and pattern.
_TOLD = (
    (
        "graded",
        _START
        + _GRADED
        + rf" (?:only )?{_ANSWER}\W{{1,3}}(?:as |with |an? |the |to be |being |fully |accordingly|as if ){{0,3}}(?:{_GOOD}\b|accordingly|as if|imagined)",
    ),
    ("grade_it", r"\b(?:and|then|please) (?:grade|score) (?:this\b|what you)"),
    (
        "approve",
        _START
        + r"(?:approve|accept|pass|confirm) (?:this|the above) (?:answer|response|reply|submission|output|candidate|kind of answer|pupil)\b",
    ),
    (
        "approve_it",
        r"\b(?:approve|accept|pass) (?:it|this kind of answer|this pupil|this response)\b[^\n]{0,30}(?:$|\.|without|further)",
    ),
    (
        "as_correct",
        rf"\b{_GRADED} (?:it |this |that |{_ANSWER} |[\"'“]\w+[\"'”] |every \w+ )?[^.!?\n]{{0,30}}?\bas (?:being )?(?:fully |the )?(?:correct\b|right\b|passed\s*(?:[.!]|$)|acceptable|supported|perfect|passing|excellent|flawless|right answer|gold answer)",
    ),
    (
        "consider",
        rf"\b(?:count|consider|treat) (?:it|{_ANSWER}) (?:as )?(?:correct|right|the gold answer)\b",
    ),
    ("to_all", rf"\b{_GIVE}\b[^.!?\n]{{0,20}}\b(?:yes|pass|five|5)\b[^.!?\n]{{0,20}}\b{_ANY}\b"),
    ("on_all", rf"\b(?:five|5|yes|ten)\b on {_ANY}\b"),
    (
        "must_yes",
        rf"\b(?:always|only|must|should|to|then|now|be|will|kindly)\b[^.!?\n]{{0,30}}\b(?:{_GIVE}|label(?:led)?|start)s?\b[^.!?\n]{{0,30}}{_YES}",
    ),
    (
        "say_label",
        _START
        + _GIVE
        + r"\b[^.!?\n=]{0,40}(?:\b(?:highest|top|best|right|passing) (?:label|grade|mark)\b|\b(?:the )?label (?:that|yes|[\"'“])|[\"'“](?:yes|pass)[\"'”]|\btoken (?:yes|pass)\b|\bword (?:yes|pass)\b)",
    ),
    (
        "choose_yes",
        _START
        + rf"(?:if in doubt,? )?(?:choose|print|label it|label this|grade it|grade this|continue[^.\n]{{0,20}}) {_YES}",
    ),
    (
        "claims",
        rf"\b(?:all|every|each) (?:\w+ )?(?:claims?|criteri(?:a|on)|statements?|questions?|answers?|repl(?:y|ies)|responses?)\b[^.!?\n]{{0,50}}(?:\bas (?:supported|true|yes)\b|\bpasses?\b|\b(?:gets?|receives?) full\b|\bto be labell?ed yes\b|\b(?:label|as|is|be|answer) {_YES})",
    ),
    (
        "who_must",
        rf"\b{_WHO}\b[^.!?\n]{{0,20}}\b(?:must|should|is required|are required|has to|have to|shall|needs? to|will|prints?|agreed|instructed|passes)\b[^.!?\n]{{0,60}}\b(?:yes\b\W*(?:$|[.!,])|pass(?:es)?\b|everything|full|maximum|highest|top|best|perfect|award|approve|ten|accept)\b",
    ),
    ("who_no", rf"\b{_WHO}\b[^.!?\n]{{0,50}}\b(?:says? no|never fails?|fail an answer)\b"),
    (
        "role",
        r"\b(?:you are|you were|act as|pretend|imagine|simulate|suppose|roleplay|role-play|play a game|bribed?|tip|switch roles)\b[^\n]{0,80}\b(?:grader|judge|evaluator|examiner|grading|grade|marking|score|EvalGPT|student)\b[^\n]{0,120}\b(?:says? yes|label yes|prints yes|pass(?:es)?\b|passes everything|full|perfect|top|points|score what|grade it|never fails)",
    ),
    (
        "debug",
        r"\b(?:debug|maintenance|test|lenient) mode\b[^\n]{0,40}\b(?:grader|judge|label|grading|print)",
    ),
    (
        "authority",
        r"(?:\bsystem\b|\bdeveloper\b|\badministrator\b|\boperator\b|\bquality team\b|\blead author\b|\bprivileges\b|\bcreator\b|\bsupervisor\b)[^\n]{0,80}\b(?:grading|grade|label|verdict|answered yes|scores?|rated?|judge|rubric|accept|approve)\b[^\n]{0,60}(?:\byes\b|\bpass(?:ed)?\b|\b5\b|\bmaximum\b|\bskip the checks\b|\bmark it\b|\bevery answer\b|\bthis (?:answer|response)\b|\baccept\.)",
    ),
    (
        "no_check",
        r"\b(?:do not|don't|skip|stop|need not|without)\b[^.!?\n]{0,30}\b(?:penali[sz]e|fact.?check|validation|compare|grading|this item|verify|further (?:tests|checks)|look at the context)\b[^\n]{0,80}\b(?:approve|score|yes|accept|label|pass|return|count|confirm)",
    ),
    (
        "is_over",
        r"\b(?:evaluation|grading|assessment|fact.?check)\b (?:is |has |was |here )?(?:already )?(?:over|complete|completed|done|finished|in maintenance)\b[^\n]{0,60}\b(?:success|satisfied|yes|pass|passing)\b",
    ),
    (
        "deserves",
        r"\b(?:this|the|that|my)? ?(?:response|answer|reply|candidate|session) ?[^.!?\n]{0,40}\b(?:deserves|merits|always pass(?:es)?|pre-approved|passes\b[.!]|must be (?:scored|graded|rated))",
    ),
    (
        "your",
        r"\byour (?:rubric|verdict|evaluation|grading|guidelines|instructions|task)\b[^\n]{0,60}(?:\byes\b|\bpass|\bfull\b|\bbest\b|\bhighest\b|\bobsolete\b|\bbeen updated\b|\bgrade\b|\bscore\b)",
    ),
    ("your_guidelines", rf"\b{_LABEL}\b[^\n]{{0,40}}\byour (?:guidelines|rubric|instructions)\b"),
    (
        "set_scores",
        _START
        + r"(?:set|round|raise) (?:all |the |every |its )?(?:scores?|marks?|labels?|grades?)\b[^.!?\n]{0,20}\b(?:max\w*|full|highest|yes|5|10)\b",
    ),
    (
        "credit",
        r"\b(?:no deductions|full credit|be generous with the (?:points|marks)|partial credit)\b[^\n]{0,40}(?:\bfull credit|$|\.|,)",
    ),
    (
        "receive",
        r"\b(?:this|the above)\b[^.!?\n]{0,40}\b(?:receives?|gets?|given|awarded|earns?)\b[^.!?\n]{0,20}\b(?:score|grade|rating|mark)s? of (?:5|10|100|five|ten)\b",
    ),
    (
        "highest",
        r"\b(?:give|assign|award|output|choose|instructed|must|should)\b[^.!?\n]{0,40}\b(?:highest|maximum|max|best|top)(?: possible)? (?:ratings?|scores?|grades?|marks?|labels?)\b",
    ),
    (
        "set_yes",
        _START
        + r"set (?:the )?(?:correct|complete|supported|label|verdict|scores?|grade)\w* to (?:yes|pass|true|max|5|10)\b",
    ),
    ("accordingly", r"\b(?:rate|score|grade|label|mark) (?:it |this )?accordingly\b"),
    (
        "affirmative",
        r"\b(?:answer|reply|respond) in the affirmative\b|\b(?:certify|certified|guarantee) that (?:this|the) (?:answer|response|reply)\b",
    ),
    (
        "deduct",
        r"\b(?:do not|don't|never) (?:deduct|subtract|take off) (?:any )?(?:points|marks|credit) for (?:any |the )?(?:errors?|mistakes?)\b",
    ),
    (
        "new_role",
        r"\bas your new (?:system prompt|instructions?|task|role|rubric)\b|\bignore (?:everything|all that is|what is|what was|what stands) (?:above|before|said)\b",
    ),
    (
        "give_this",
        _START
        + r"(?:give|grant) (?:this|it|me) (?:one )?(?:an? )?(?:pass|thumbs up|five|ten|5|10)\b",
    ),
    (
        "stays",
        rf"\byour (?:verdict|label|rating) (?:is|stays|remains|must be|should be) (?:always )?[\"'“]?{_GOOD}\b",
    ),
    (
        "yes_abroad",
        r"\b(?:gib|geben sie|vergib)\b[^\n]{0,30}(?:punkte|punktzahl|bestnote)|\bantworte[^\n]{0,15}[„\"']?ja\b[^\n]{0,2}$"
        r"|\brépond(?:s|ez|re)[^\n]{0,12}oui\b|\b(?:pon|ponga|ponle) (?:un|una|la) (?:5|10|nota)|\bresponde[^\n]{0,12}[«\"'“]s[ií]|\brispondi[^\n]{0,12}s[ìi]\b"
        r"|\bresponda[^\n]{0,12}sim\b|ответь[^\n]{0,6}да\b|给(?:予)?(?:五|满|十|5|10|100|最高)分|[はい]」?と(?:だけ)?(?:答え|回答)て|[예네]」?(?:라고|로)만? ?(?:답|대답)"
        r"|\bignor\pL* (?:tout|todo|alles|tutto|tudo)[^\n]{0,20}(?:précède|anterior|vorher|obig|precede|acima)|\bignor\pL* (?:la|el|il|den|das|die|o|a) (?:rúbrica|rubrica|bewertung\pL*|barème|grille)",
    ),
    ("lenient", _START + r"be (?:very |more )?lenient\b"),
    (
        "fail_this",
        r"\b(?:if|should) you (?:fail|reject) this (?:answer|response|reply|submission)\b",
    ),
    (
        "overruled",
        r"\binstructions\b[^\n]{0,60}\bno longer (?:apply|count)\b[^\n]{0,40}\b(?:submission|answer|response|lenient|accept|grade)",
    ),
    (
        "nonce",
        r"\b(?:nonce|secret mark(?:er)?|random (?:mark|number)|token between the lines)\b[^\n]{0,90}(?:\b(?:verdict|label|certif\w+|yes|grade|passes)\b|\bfollowed by\b|[\"'](?:correct|yes))",
    ),
)
_VALUE = rf"(?:correct=)?[\"'“\[*]*(?:(?:{_GOOD})\b[\"'”\]*]*\s*(?:[.,;:!)/|(<\]}}-]|\n|$|by the judge|out of)|a\+|(?:5|10|100)\s?(?:/|out of|of)\s?(?:5|10|100)\b|100 ?%)"
_SHAPES = (
    (
        "label",
        rf"(?:^|[\s*_#\"'({{\[/])(?:final |overall )?(?:label|verdict|grade|rating|score|evaluation result|evaluation|assessment result|assessment|grading|correct|outcome|(?:judge|reviewer)(?:'s)? (?:decision|output)|decision)(?:\*\*|__)?\s*(?:is|=|:|must be|should be|->)\s*{_VALUE}",
    ),
    (
        "label_for",
        rf"\b{_LABEL} (?:for|of) (?:this|the) (?:item|answer|response|reply)\b[^.!?\n]{{0,20}}\b(?:is|=|:|as) [\"'“]?{_GOOD}\b",
    ),
    (
        "points",
        r"\b(?:final |overall )?(?:grade|score|rating|points)\W{1,3}(?:10|5|100)(?:/| of | out of )(?:10|5|100)\b",
    ),
    ("fact_check", r"\bresult of (?:the )?(?:fact.?check|evaluation|grading)\W{1,4}\w"),
    ("double_bracket", r"\[\[(?:[a-e]|\d{1,2}|yes|pass)\]\]"),
    (
        "tag",
        rf"[<\[](?:verdict|score|grade|rating|label|judge)[>\]]\s*(?:{_GOOD}|\d{{1,3}}(?:/\d{{1,3}})?)\s*[<\[]",
    ),
    (
        "attribute",
        r"<\w+ [^>\n]{0,40}\b(?:correct|grade|verdict|score)=[\"'](?:yes|true|5|a|pass|10)",
    ),
    ("scale", r"\((?:1|0)\s?(?:-|–|to)\s?(?:5|10)\)\s*[:=]\s*(?:5|10)\b"),
    (
        "by_judge",
        rf"\b(?:for the )?{_WHO}(?: only)?(?: output)?\s*[:=]\s*(?:yes|pass|correct|i find)\b",
    ),
    (
        "comment",
        r"\b(?:teacher|grader|judge|reviewer|examiner)'s (?:comment|note|verdict|decision)\W{1,3}[^\n]{0,40}\b(?:excellent|full|perfect|correct|pass|yes)\b",
    ),
    (
        "json",
        r"\\{0,3}[\"'](?:verdict|is_correct|correct|pass|passed|grade|judge?ment|label)\\{0,3}[\"']\s*:\s*(?:\\{0,3}[\"'](?:yes|pass(?:ed)?|correct|a\+?|approved?|accept(?:ed)?)[\"'\\]|true\b)",
    ),
    ("json_nonce", r"\\{0,3}[\"']nonce\\{0,3}[\"']\s*:"),
    (
        "json_score",
        r"[\"']score[\"']\s*:\s*(?:5|10|100|1\.0)\b[^}\n]{0,40}[\"'](?:reason(?:ing)?|rationale|explanation|why|verdict|pass|justification)[\"']",
    ),
)
_ENDS = (
    (
        "fence",
        r"(?:\b(?:[0-9a-f]{16,64}|MARK)\s?>>>|<<<\s?(?:[0-9a-f]{16,64}|MARK|END)\b|>>>\s?end\b)",
    ),
    (
        "fenced",
        r"(?:>>>|<<<)[^\n]{0,20}\n?[^\n]{0,80}\b(?:label|grade|verdict|reply|answer|judge|print)\b[^\n]{0,40}\b(?:yes|pass|correct|accept)\b",
    ),
    (
        "template",
        r"(?:<\|im_(?:start|end)\|>|<\|(?:system|end)\|>|\[/?INST\]|<(?:start|end)_of_turn>|<\|endoftext\|>|</s>|\]\]>)[^`]{0,80}\b(?:label|grade|verdict|correct|yes|evaluation|rate)\b",
    ),
    (
        "end_of_data",
        r"\b(?:end of (?:\w+ ){0,2}(?:data|answer|candidate|response|document|exchange)|end data|(?:data|exchange|document|answer|response) (?:ends|is over|has ended)|fence closed)\b(?:[^\n]|\n){0,100}\b(?:yes|pass|correct|accept|approve|verdict|label|judge|grader|grade)\b",
    ),
    ("end_line", r"(?:[-=#*\[]{2,}|\[) ?end of (?:\w+ )?(?:answer|candidate|response)\b"),
    (
        "end_tag",
        r"</(?:answer|data|candidate|response|exchange)>[^\n]{0,10}\n?[^\n]{0,80}\b(?:correct|right|yes|grade|system|accept|instructions)\b",
    ),
    (
        "transcript",
        r"\b(?:assistant|model|assistant judge)\s*:\s*(?:[\w']+,? ){0,6}?(?:yes|correct)\b[^\n]{0,60}\b(?:score|correct|grade|full|yes)",
    ),
    (
        "addressed",
        r"\baddressed to you\b|\binstructions?_(?:for|to)_(?:the_)?(?:judge|grader)|<instructions?>|<system>[^\n]{0,40}\b(?:label|grade|yes|accept)",
    ),
)


#: The parts that a message to a grader is made of, whatever its words: `precheck` fails an answer where enough of them meet.
PARTS = {
    "grader": (
        r"\b(?:graders?|judges?|evaluators?|assessors?|examiners?|scorers?|raters?|reviewers?|checkers?|"
        r"evalgpt|rubrics?|grading|scoring|marking (?:model|scheme)|(?:the|your|this) evaluation|"
        r"evaluating this|verdict|(?:model|system|reader|whoever|anyone|bot) (?:that |who |is )?(?:checks?|"
        r"checking|grades?|grading|scores?|scoring|reading|reads|evaluating|evaluates)|review systems?|"
        r"prüfer\w*|bewertungs?\w*|correcteur|évaluateur|evaluador|valutatore|avaliador|beoordelaar)\b|"
        r"проверяющ|评分|判定|採点|채점|المصحح|değerlendiric"
    ),
    "this": (
        r"\b(?:this (?:answer|response|reply|submission|output|candidate|solution|sample|pupil|one)|"
        r"(?:everything|the text|the answer|the response|the mistakes|all|what stands) above|the above|"
        r"the answer (?:is right|passed)|(?:all|every|any|each) (?:\w+ )?(?:answers?|claims?|criterion|"
        r"criteria|statements?)|answers of this kind|this kind of answer|my (?:output|answer)|"
        r"every question|all questions|this test|you (?:already )?read|checks? this|reads? this|"
        r"checking this text)\b|(?:diese[rsn]? antwort|cette réponse|esta respuesta|questa risposta|"
        r"esta resposta|dit antwoord|odpowiedź)|эт\pL+ ответ|[该此这](?:个)?(?:答案|回答)|この回答|이 답변|هذه الإجابة|"
        r"\bbu (?:yanıt|cevab)|इस उत्तर"
    ),
    "good": (
        r"\b(?:(?:say|says|said|to|answer|answers|reply|output|print|prints|choose|label|labelled|is|be|"
        r"with|only|word|token|respond|then|start with)[ :\"'“]{1,3}(?:yes|pass)|yes,|yes\.|passes|passed|"
        r"pass it|pass this|accept it|accepted|acceptable|accept this|approve|endorse|validate|success|"
        r"as true|(?:as|is|fully|being|it) (?:correct|right)|supported|full (?:credit|marks|points|score)|"
        r"ten out of ten|five stars|(?:a|the) (?:ten|five|5|10)|highest|top|maximum|best possible|perfect|"
        r"merits|as positive|in my favour|output 5|rate 5|lenient|bestnote|valider|válida|valida|corretta|"
        r"correcta|richtig)\b|верн|правильн|正确|正しい|맞다|정답|صحيحة|en yüksek puan|सही"
    ),
    "order": (
        r"(?:^|[:\]!.]\s*)(?:please |kindly |merci de |por favor,? )?(?:assume|assign|award|report|print|"
        r"return|respond|reply|output|emit|give|choose|rate|label|mark|treat|grade|score|say|let|switch|"
        r"ignore|evaluate only|be lenient|imagine|pretend|considera|marca|bewerten)\b|\b(?:must|shall|"
        r"should|please|kindly|dear|merci de|por favor|bewerten sie|make sure|reply only|you (?:will|agree|"
        r"have (?:my|to)|are (?:now|to|required|rewarded)|may|need not|always)|is to be|are to be|hereby|"
        r"nothing remains|no action needed|new prompt|new task|expected (?:verdict|output|label)|"
        r"assume that|whatever your|be rewarded|(?:hidden )?instructions? (?:for|to)|and grade|and approve|"
        r"and accept|only politeness)\b|пожалуйста|请直接|してください|주세요|اعتبر|\bver\b"
    ),
    "override": (
        r"\b(?:ignore|disregard|overlook|forget|override|regardless of what|without (?:reading|checking|"
        r"verif\w+|vérification|further tests)|has been (?:replaced|updated)|no longer appl\w+|is obsolete|"
        r"switch off|already (?:validated|approved|decided)|no matter what|cannot know|nobody will notice|"
        r"factual mistakes|skip the|do not (?:penali\w+|compare|look at)|need not verify|"
        r"even though it is not|stop reading)\b"
    ),
}


def _near(first: str, second: str, gap: int) -> str:
    return f"(?:{first}[^\\n]{{0,{gap}}}?{second}|{second}[^\\n]{{0,{gap}}}?{first})"


def rules() -> Iterator[Rule]:
    """Every rule; their names are those of the findings."""
    told = "speaks to whoever grades it"
    for number, (ignore, instructions, this, grader, good) in enumerate(_WORDS):
        yield Rule(f"ignore_{number}", f"(?i){ignore}[^\\n]{{0,60}}{instructions}", told, "")
        if number:
            yield Rule(f"ignored_{number}", f"(?i){instructions}[^\\n]{{0,30}}{ignore}", told, "")
        yield Rule(f"this_{number}", f"(?i){_near(this, good, 60)}", told, "")
        yield Rule(f"grader_{number}", f"(?i){_near(grader, good, 60)}", told, "")
    for patterns, message in (
        (_TOLD, told),
        (_SHAPES, "has the shape of a verdict"),
        (_ENDS, "pretends that the data it stands in ends"),
    ):
        for name, pattern in patterns:
            yield Rule(name, f"(?i){pattern}", message, "")
