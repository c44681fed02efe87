"""Federated averaging of a bundle with NVIDIA FLARE: simulate it on this machine, or write the job for a federation.

See docs/federated.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from monai.bundle import ConfigParser
from monai.networks.utils import get_state_dict
from nvflare.app_opt.pt.file_model_persistor import PTFileModelPersistor
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.recipe.sim_env import SimEnv

from segbundles.handlers import save_weights
from segbundles.networks import load_weights


def main() -> None:
    """Simulate, or export."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle_root", type=Path, required=True, help="the bundle; at the same place on every site")
    parser.add_argument("--settings", required=True, help="JSON of a site's settings; {site} becomes its name")
    parser.add_argument("--sites", required=True, help="names, separated by commas")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--local_epochs", type=int, default=1)
    parser.add_argument("--weights", type=Path, help="model.pt to start from; without it the network starts at random")
    parser.add_argument("--key_metric", default="val_mean_dice", help="of the bundle's validation; picks the best model")
    parser.add_argument("--out", type=Path, required=True, help="folder of the job and of what the simulator writes")
    parser.add_argument("--export", action="store_true", help="write the job for a federation instead of simulating it")
    args = parser.parse_args()
    root, out, sites = args.bundle_root.resolve(), args.out.resolve(), args.sites.split(",")

    config = ConfigParser()
    config.read_config(str(root / "configs" / "train.json"))
    # those that shape the network are the same for all
    config.update(json.loads(Path(args.settings.format(site=sites[0])).read_text(encoding="utf-8")))
    torch.manual_seed(0)
    network = config.get_parsed_content("network_def")
    if args.weights is not None:
        load_weights(network, args.weights)
    out.mkdir(parents=True, exist_ok=True)
    start = out / "start.pt"
    torch.save(get_state_dict(network), start)

    recipe = FedAvgRecipe(
        name=root.name,
        model_persistor=PTFileModelPersistor(source_ckpt_file_full_name=str(start)),
        min_clients=len(sites),
        num_rounds=args.rounds,
        train_script=str(Path(__file__).with_name("client.py")),
        train_args=f"--bundle_root {root} --settings {Path(args.settings).resolve()} --local_epochs {args.local_epochs}",
        key_metric=args.key_metric,
    )
    if args.export:
        recipe.export(str(out))
        return
    recipe.execute(SimEnv(clients=sites, workspace_root=str(out)))
    for name in ("FL_global_model.pt", "best_FL_global_model.pt"):
        for path in out.rglob(name):
            load_weights_of = torch.load(path, map_location="cpu", weights_only=True)["model"]
            network.load_state_dict({key: torch.as_tensor(value) for key, value in load_weights_of.items()})
            save_weights(network, out / name.replace("FL_global_model", "model"))
            print(f"{path} -> {out / name.replace('FL_global_model', 'model')}")


if __name__ == "__main__":
    main()
