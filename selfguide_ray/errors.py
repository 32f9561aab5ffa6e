"""The error a user sees: what is wrong, why it cannot work, what to do instead."""


class SelfGuideError(Exception):
    """Bad input, told in three parts; the command line prints it and exits with 2.

    what     the value and where it stands
    why      the reason it cannot work
    instead  the way out
    """

    def __init__(self, what: str, why: str, instead: str) -> None:
        super().__init__(what, why, instead)  # all three in args, so that it survives pickling between processes
        self.what, self.why, self.instead = what, why, instead

    def __str__(self) -> str:
        return f"{self.what}\n  why: {self.why}\n  instead: {self.instead}"
