"""HTML for every page: elements, the frame, style and script, and figures."""
