"""`formation top`: the network live on one screen; only another client of the API.

`model.py` holds the state and says what a key does to it, `render.py` makes the screen of it; both are pure. `feed.py`
fetches in threads of its own, so that no key ever waits for a node; `app.py` ties them to the terminal.
"""
