"""Reports of a comparison between trained models: JSON, HTML, figures."""
