"""Serve a model over HTTP, with dynamic batching over the engine.

    python examples/serve_http.py --model deit_small_distilled --port 8000
    python examples/serve_http.py --model runs/photos/model --unknown
    curl --data-binary @cat.jpg 'http://localhost:8000/classify?topk=3'

POST /classify   an image file as the body -> {"predictions": [{"class", "label", "score"}, ...]},
                 and with --threshold or --unknown "unknown": true where no prediction is left
GET  /health     {"status": "ok", ...} with counts of requests, batches and refusals

400 for a body that is no image, 413 for one that is too large, 422 for a wrong topk, 503 when
--queue requests are being served already. Needs `pip install 'deit_fast[serve]'`.

A batch holds the requests that arrived while the one before was computed, up to --batch: a single
request never waits for others, and batches grow with the load.
"""

import argparse
import asyncio
import io
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Annotated

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Query, Request
from PIL import Image
from starlette.requests import ClientDisconnect

import deit_fast
from deit_fast import batch_inference, images, predictions

TOPK = 20  # the largest topk of a request


class Batcher:
    """Run `compute(list of items) -> list of results` in a thread, one batch after the other."""

    def __init__(self, compute, max_batch: int):
        self.compute, self.max_batch = compute, max_batch
        self.queue = asyncio.Queue()
        self.thread = ThreadPoolExecutor(1)
        self.batches = 0

    async def __call__(self, item):
        """Return the result of one item."""
        result = asyncio.get_running_loop().create_future()
        self.queue.put_nowait((item, result))
        return await result

    async def run(self):
        loop = asyncio.get_running_loop()
        while True:
            waiting = [await self.queue.get()]
            while len(waiting) < self.max_batch and not self.queue.empty():
                waiting.append(self.queue.get_nowait())
            waiting = [w for w in waiting if not w[1].cancelled()]  # their clients disconnected
            if not waiting:
                continue
            items = [item for item, _ in waiting]
            try:
                results = await loop.run_in_executor(self.thread, self.compute, items)
                finished = list(zip(waiting, results, strict=True))
            except Exception as error:
                finished = [(one, error) for one in waiting]
            self.batches += 1
            for (_, future), result in finished:
                if future.cancelled():
                    continue
                if isinstance(result, Exception):
                    future.set_exception(result)
                else:
                    future.set_result(result)


def create_app(
    model, max_batch=32, max_bytes=10_000_000, max_pixels=50_000_000, max_queue=1024,
    threshold=None, unknown=False,
) -> FastAPI:  # fmt: skip
    """Build the application.

    Args:
        model: In eval mode, on the device it is to run on.
        max_batch: Images in one forward pass.
        max_bytes: Of a request's body.
        max_pixels: Of an image.
        max_queue: Requests served at the same time.
        threshold: Classes of at least this probability alone are predicted.
        unknown: Nothing is predicted for images that are unknown by the model's calibration.

    Returns:
        The FastAPI application.
    """
    predictor = batch_inference.Predictor(
        model, max_batch, topk=TOPK, threshold=threshold, unknown=unknown
    )
    labels = batch_inference.label_names(model)
    Image.MAX_IMAGE_PIXELS = max_pixels // 2  # Pillow refuses images with twice as many
    decoders = ThreadPoolExecutor(os.cpu_count())
    batcher = Batcher(lambda pixels: classify(predictor, labels, pixels), max_batch)
    counts = {"requests": 0, "refused": 0, "in_flight": 0}

    @asynccontextmanager
    async def lifespan(app):
        running = asyncio.create_task(batcher.run())
        yield
        running.cancel()

    app = FastAPI(title="deit_fast", lifespan=lifespan)

    @app.post("/classify")
    async def post_classify(request: Request, topk: Annotated[int, Query(ge=1, le=TOPK)] = 5):
        counts["requests"] += 1
        # in flight: being read, decoded, or waiting for a batch
        if counts["in_flight"] >= max_queue:
            counts["refused"] += 1
            busy = {"Retry-After": "1", "Connection": "close"}
            raise HTTPException(503, f"{max_queue} requests are being served", headers=busy)
        counts["in_flight"] += 1
        try:
            body = await read(request, max_bytes)
            loop = asyncio.get_running_loop()
            pixels = await loop.run_in_executor(decoders, predictor.decoder, io.BytesIO(body))
            entry = await batcher(pixels)
            return entry | {"predictions": entry["predictions"][:topk]}
        except images.Unreadable as error:
            counts["refused"] += 1
            raise HTTPException(400, f"body: {error}") from error
        except ClientDisconnect as error:
            counts["refused"] += 1
            raise HTTPException(400, "body: ended early") from error
        except HTTPException:
            counts["refused"] += 1
            raise
        finally:
            counts["in_flight"] -= 1

    @app.get("/health")
    async def get_health():
        return {"status": "ok", **counts, "batches": batcher.batches}

    return app


async def read(request: Request, limit: int) -> bytes:
    """Read the body, holding no more than `limit` bytes."""
    close = {"Connection": "close"}  # the rest of the body is not read
    too_large = HTTPException(413, f"body: more than {limit} bytes", headers=close)
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limit:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise too_large
    if not body:
        raise HTTPException(400, "body: empty, expected an image file")
    return bytes(body)


def classify(predictor, labels, pixels: list[np.ndarray]) -> list[dict]:
    """Return the best classes of each image, and whether it is unknown where that was asked."""
    columns = predictor(np.stack(pixels))
    batch = batch_inference.Batch([""] * len(pixels), [None] * len(pixels), columns)
    return [
        {key: value for key, value in entry.items() if key != "image"}
        for entry in predictions.entries(batch, labels)
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", default="deit_small_distilled", help="a name, or a folder of weights"
    )
    parser.add_argument("--pretrained", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--batch", type=int, default=32, help="largest batch (default: %(default)s)"
    )
    parser.add_argument(
        "--queue", type=int, default=1024, help="requests at once (default: %(default)s)"
    )
    parser.add_argument("--max-bytes", type=int, default=10_000_000, help="(default: %(default)s)")
    parser.add_argument("--threshold", type=float, help="only classes of at least this probability")
    parser.add_argument("--unknown", action="store_true", help="by the folder's calibration")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()

    torch.manual_seed(0)
    device, dtype = ("cuda", torch.half) if torch.cuda.is_available() else ("cpu", torch.float)
    if os.path.isdir(args.model):
        model = deit_fast.from_pretrained(args.model)
    else:
        model = deit_fast.create_model(args.model, pretrained=args.pretrained)
    app = create_app(
        model.to(device, dtype).eval(), args.batch, args.max_bytes, max_queue=args.queue,
        threshold=args.threshold, unknown=args.unknown,
    )  # fmt: skip
    uvicorn.run(app, host=args.host, port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
