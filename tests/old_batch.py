"""A stand-in for engine.runner around the old batch, until there is one: calls one after the other, a chunk a round."""

import threading
import time
from collections import deque

from mlx_gemma_mtp.engine.request import Advance, Delivery
from mlx_gemma_mtp.engine.scheduler import Batch
from mlx_gemma_mtp.speculative.depth import AUTO


class Runner:
    def __init__(self, target, drafter, tables, depth, settings):
        self.parts, self.settings, self.tables, self.depth = (target, drafter), settings, tables, depth
        self.waiting, self.live, self.cancelled, self.paused = deque(), {}, {}, set()
        self.chunks = None

    @property
    def busy(self):
        return bool(self.cancelled) or (bool(self.live or self.waiting) and not self.paused)

    def submit(self, request):
        self.waiting.append(request)

    def cancel(self, id, reason="cancelled"):
        if id in self.live or any(request.id == id for request in self.waiting):
            self.cancelled[id] = reason

    def pause(self, id):
        self.paused.add(id)

    def resume(self, id):
        self.paused.discard(id)

    def next_deadline(self):
        every = [*self.live.values(), *self.waiting]
        return min((request.deadline for request in every if request.deadline is not None), default=None)

    def round(self):
        now, items = time.monotonic(), []
        for request in [*self.live.values(), *self.waiting]:
            if request.deadline is not None and request.deadline <= now:
                self.cancelled[request.id] = "timeout"
        for request in [request for request in self.waiting if request.id in self.cancelled]:
            self.waiting.remove(request)
            items.append(Delivery(request.id, request.cancel(self.cancelled.pop(request.id))))
        if not self.live and self.waiting:
            first = self.waiting[0]
            same = [request for request in self.waiting if request.drafts == first.drafts]
            some = list({request.index: request for request in reversed(same)}.values())
            some = sorted(some, key=lambda request: request.id)[: self.settings.max_rows]
            self.live = {request.id: request for request in some}
            self.waiting = deque(request for request in self.waiting if request.id not in self.live)
            self.chunks = self._begin(some)
        for id in [id for id in self.cancelled if id in self.live]:
            self.paused.discard(id)
            request = self.live.pop(id)
            items.append(Delivery(id, request.cancel(self.cancelled.pop(id))))
        if self.live and not self.paused and not items:
            self.told = []
            chunk = next(self.chunks)
            request = next((each for each in self.live.values() if each.index == chunk.index), None)
            items += [Advance(request.id, *told) for told in self.told if request]
            if request is not None:
                items.append(Delivery(request.id, chunk))
                if chunk.result is not None:
                    del self.live[request.id]
        if not self.live and self.chunks is not None:
            self.chunks.close()
            self.chunks = None
            self.paused.clear()
            if self.tables is not None:
                self.tables.learn(self.depth.learned())
        self.cancelled.clear()
        return items

    def _begin(self, some):
        drafts, settings = some[0].drafts, self.settings
        if self.parts[1] is None or drafts != AUTO:
            drafts = 0 if self.parts[1] is None else min(drafts, max(request.limit for request in some))
        parts = self.depth, drafts, settings.prefill_chunk, settings.suppress, settings.drafting
        batch = Batch(*self.parts, some, *parts)
        return batch.run(threading.Event(), lambda done, total: self.told.append((done, total)))

    def fail(self, error):
        items = [Delivery(id, request.cancel("error", str(error))) for id, request in self.live.items()]
        self.live, self.chunks = {}, None
        return items

    def close(self):
        every = [*self.live.values(), *self.waiting]
        self.live, self.chunks = {}, None
        self.waiting.clear()
        return [Delivery(request.id, request.cancel()) for request in every]
