"""An engine that tells afterwards what it was asked."""

from selfguide_ray.config import Student
from selfguide_ray.engine.scripted import ScriptedEngine


class RecordingEngine(ScriptedEngine):
    """The scripted engine, with a memory of its requests."""

    def __init__(self):
        super().__init__(Student(engine="scripted"))
        self.requests = []

    def generate(self, requests):
        self.requests += requests
        return super().generate(requests)
