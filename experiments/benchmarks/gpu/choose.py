"""What the results say about the package's defaults."""


def choices(results: dict) -> str:
    return ""
