"""A second reward for methods that combine several: the share of running sums that are right."""


def steps(response: str, prompt: str) -> float:
    terms = [int(term) for term in prompt.rstrip("=").split("+")]
    expected = [str(sum(terms[: i + 1])) for i in range(1, len(terms))]
    given = response.split(",")
    return sum(a == b for a, b in zip(given, expected, strict=False)) / max(len(expected), len(given), 1)
