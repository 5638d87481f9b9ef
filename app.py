"""The web app: page settings and navigation, nothing else."""

import streamlit as st

st.set_page_config(page_title="planner: does it fit?", page_icon="planner/ui/icon.svg", layout="wide")
page = st.navigation(
    [st.Page("planner/ui/pages/fit.py", title="Fit", default=True)],
    position="top",
)
page.run()
