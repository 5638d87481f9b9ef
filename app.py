"""The web app: page settings and navigation, nothing else."""

from pathlib import Path

import streamlit as st

UI = Path(__file__).parent / "planner" / "ui"

st.set_page_config(page_title="planner: does it fit?", page_icon=UI / "icon.svg", layout="wide")
PAGES = [
    st.Page(UI / "pages" / "fit.py", title="Fit", icon=":material/memory:", default=True),
    st.Page(UI / "pages" / "serve.py", title="Serve", icon=":material/dns:"),
]
page = st.navigation(PAGES, position="top")
page.run()
