"""Classify the images of a folder in a few lines of Python, as `deit-fast classify` does.

python examples/classify_folder.py photos/ --model deit_base_distilled > classes.jsonl
python examples/classify_folder.py deit_fast/data --no-pretrained      # no network needed
"""

import argparse
import json
import sys

import torch

import deit_fast
from deit_fast import batch_inference, images, predictions


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("inputs", nargs="+", help="folders, images, patterns in quotes, lists")
    parser.add_argument("--model", default="deit_small_distilled")
    parser.add_argument("--pretrained", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()

    device, dtype = ("cuda", torch.half) if torch.cuda.is_available() else ("cpu", torch.float)
    model = deit_fast.create_model(args.model, pretrained=args.pretrained).to(device, dtype).eval()
    predictor = batch_inference.Predictor(model, args.batch, topk=3)
    labels, clock = batch_inference.label_names(model), batch_inference.Clock()

    count = 0
    for batch in batch_inference.predict(predictor, images.find(args.inputs), args.workers, clock):
        for entry in predictions.entries(batch, labels):
            print(json.dumps(entry))
            count += 1
    print(f"{count} images, {clock.share:.0%} of the time waiting for decoders", file=sys.stderr)


if __name__ == "__main__":
    main()
