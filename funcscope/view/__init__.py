"""Pure renderers, result to plotly figure, and a report that puts them on one page (extra `funcscope[view]`)."""
