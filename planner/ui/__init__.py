"""The web app: state (URL and session), controls (inputs), panels (outputs), and one file a page."""
