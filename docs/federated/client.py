"""A site of a federation: MONAI's client for bundles, run by NVIDIA FLARE. See docs/federated.md."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import nvflare.client as flare
from monai.fl.client import MonaiAlgo
from monai.fl.utils.constants import ExtraItems, FlStatistics
from monai.fl.utils.exchange_object import ExchangeObject
from nvflare.apis.dxo import MetaKey


def main() -> None:
    """Evaluate the server's model on this site's data, train it, and send it back, round after round."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--settings", required=True, help="JSON file with this site's settings; {site} becomes its name"
    )
    parser.add_argument("--local_epochs", type=int, default=1)
    args = parser.parse_args()

    flare.init()
    site = flare.get_site_name()
    settings = json.loads(Path(args.settings.format(site=site)).read_text(encoding="utf-8"))
    algo = MonaiAlgo(
        bundle_root=settings["bundle_root"],
        local_epochs=args.local_epochs,
        send_weight_diff=False,
        train_kwargs=dict(settings),
        eval_kwargs={**settings, "output_dir": str(Path(settings["output_dir"]) / "evaluation")},
    )
    algo.initialize({ExtraItems.CLIENT_NAME: site})
    while flare.is_running():
        model = ExchangeObject(weights=flare.receive().params)
        metrics = algo.evaluate(model).metrics
        algo.train(model)
        update = algo.get_weights()
        flare.send(
            flare.FLModel(
                params=dict(update.weights),
                metrics={name: float(value) for name, value in metrics.items()},
                meta={MetaKey.NUM_STEPS_CURRENT_ROUND: update.statistics[FlStatistics.NUM_EXECUTED_ITERATIONS]},
            )
        )
    algo.finalize()


if __name__ == "__main__":
    main()
