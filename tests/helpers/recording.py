"""What stands for a CUDA graph where there is no GPU."""


class Recorder:
    """Keeps the function that is to be recorded; a replay calls it. Recording runs nothing, as on a GPU.

    Args:
        fails: Whether nothing can be recorded.
    """

    gave_up = False

    def __init__(self, *, fails=False):
        self.fails = fails
        self.num_recorded = self.num_replayed = 0

    def record(self, body):
        self.num_recorded += 1

        def replay():
            self.num_replayed += 1
            body()

        return None if self.fails else replay
