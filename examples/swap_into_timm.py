"""Speed up a timm model you already have: replace its modules, compare, time, and restore.

python examples/swap_into_timm.py
python examples/swap_into_timm.py --model vit_base_patch16_224 --batch 256
"""

import argparse
import time

import timm
import torch

import deit_fast


@torch.inference_mode()
def images_per_second(model, images, runs=5):
    model(images)
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        model(images).sum().item()  # waits for the device
        times.append(time.perf_counter() - began)
    return len(images) / sorted(times)[runs // 2]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="deit_tiny_distilled_patch16_224")
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()

    device, dtype = ("cuda", torch.half) if torch.cuda.is_available() else ("cpu", torch.float)
    model = timm.create_model(args.model).to(device, dtype).eval()  # yours, with its weights
    images = torch.randn(args.batch, *model.pretrained_cfg["input_size"], dtype=dtype).to(device)
    with torch.inference_mode():
        before = model(images)
    rate = images_per_second(model, images)
    weights = {name: w.data_ptr() for name, w in model.state_dict().items()}

    print(deit_fast.accelerate(model))  # in place; says what was replaced or skipped, and why

    with torch.inference_mode():
        difference = ((model(images) - before).norm() / before.norm()).item()
    faster = images_per_second(model, images)
    print(f"relative difference of the logits: {difference:.1e}")
    print(f"images/s on this {device}: {rate:.1f} before, {faster:.1f} after")
    if not difference < (1e-5 if dtype == torch.float else 1e-2):
        raise SystemExit("the logits changed")

    deit_fast.restore(model)
    same = {name: w.data_ptr() for name, w in model.state_dict().items()} == weights
    print(f"restored: {type(model).__module__}, the same parameters: {same}")


if __name__ == "__main__":
    main()
