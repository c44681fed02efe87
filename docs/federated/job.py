"""Federated averaging of a bundle with NVIDIA FLARE: simulate it on this machine, or write the job for a federation.

See docs/federated.md.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
from monai.bundle import ConfigParser
from nvflare.app_opt.pt.file_model_persistor import PTFileModelPersistor
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.recipe.sim_env import SimEnv

from segbundles.bundle import RunSettings
from segbundles.facts import write_facts
from segbundles.handlers import save_weights
from segbundles.networks import load_weights


def main() -> None:
    """Simulate or write the job."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--settings", required=True, help="JSON file with a site's settings; {site} becomes its name")
    parser.add_argument("--sites", required=True, help="names, separated by commas")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--local_epochs", type=int, default=1)
    parser.add_argument("--weights", help="model.pt to start from; without it the network starts at random")
    parser.add_argument(
        "--key_metric", default="val_mean_dice", help="metric of the validation that picks best_model.pt"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--job_only", action="store_true", help="write the job for a federation, simulate nothing")
    args = parser.parse_args()
    script, site_settings = Path(__file__).resolve(), Path(args.settings).absolute()
    if len(str(site_settings).split()) > 1:
        parser.error(f"--settings {str(site_settings)!r} contains spaces, where FLARE would split it: move the files")
    sites, out = args.sites.split(","), args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)

    # the settings that shape the network are the same at all sites
    given = json.loads(Path(args.settings.format(site=sites[0])).read_text(encoding="utf-8"))
    config = ConfigParser()
    config.read_config(str(Path(given["bundle_root"], "configs", "train.json")))
    config.update(given)
    torch.manual_seed(0)
    network = config.get_parsed_content("network_def")
    if args.weights is not None:
        load_weights(network, args.weights)
    start = out / "start.pt"
    torch.save(network.state_dict(), start)

    os.chdir(script.parent)  # FLARE looks for a script with an absolute path at the same path on every site
    recipe = FedAvgRecipe(
        name=Path(given["bundle_root"]).name,
        model_persistor=PTFileModelPersistor(source_ckpt_file_full_name=start.name),
        min_clients=len(sites),
        num_rounds=args.rounds,
        train_script="client.py",
        train_args=f"--settings {site_settings} --local_epochs {args.local_epochs}",
        key_metric=args.key_metric,
    )
    recipe.add_server_file(str(start))
    if args.job_only:
        recipe.export(str(out))
        return
    run = recipe.execute(SimEnv(clients=sites, workspace_root=str(out)))
    write_models(network, config.get_parsed_content("settings"), run.get_result(clean_up=False), out)


def write_models(network: torch.nn.Module, settings: RunSettings | None, result: str | None, out: Path) -> None:
    """Write the models of a simulation, with their facts, as a training writes them.

    Args:
        network: network of the models.
        settings: settings of the network, for the facts.
        result: folder of the simulation, as FLARE gives it; its environment variables may move it.
        out: folder to write to.

    Raises:
        SystemExit: when the folder contains no model.
    """
    models = [] if result is None else sorted(Path(result).rglob("*FL_global_model.pt"))
    if not models:
        raise SystemExit(f"the simulation left no model in {result}: see the logs there")
    for saved in models:
        state = torch.load(saved, map_location="cpu", weights_only=True)["model"]
        network.load_state_dict({name: torch.as_tensor(value) for name, value in state.items()})
        path = out / saved.name.replace("FL_global_model", "model")
        save_weights(network, path)
        write_facts(path, settings)
        print(f"Wrote {path}")


if __name__ == "__main__":
    main()
