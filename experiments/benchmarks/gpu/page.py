"""Formats gpu.json as Markdown."""


def page(results: dict) -> str:
    return ""
