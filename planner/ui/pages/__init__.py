"""Pages, one file each, run by streamlit as scripts; importing one runs it."""
