"""An OpenAI-compatible API and a web page.

    protocol.py  the wire: requests checked field by field, responses and errors built
    worker.py    one thread a model: a short queue in, pieces of answers out
    app.py       the routes
    guard.py     who may ask: Host, Origin, API key; and the security headers of every reply
    runs.py      what training runs have written so far
    server.py    opens models and a port, and serves until told to stop
    page/        the web page, plain files

Import from these files; this package itself loads nothing.
"""
