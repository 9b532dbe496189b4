"""An HTTP server over any engine and chat format, in OpenAI's form: `tools/serve.py`.

`app.py` has the routes, `fields.py` and `asks.py` read requests, `choices.py` generates,
`chat.py` and `completions.py` say it in OpenAI's words, `answering.py` sends it and aborts what
nobody waits for, `recording.py` records answers and gives them again, `serving.py` runs it all.
"""
