#!/usr/bin/env bash
# From nothing to a segmented image, then to a trained and evaluated bundle, on synthetic data: ./quickstart.sh [bundle]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source common/environment.sh

bundle=${1:-left_atrium_vnet}
[[ -f bundles/$bundle/configs/args_quickstart.json ]] ||
    die "there is no bundle '$bundle' to start with; choose from: $(cd bundles && echo */configs/args_quickstart.json | sed 's#/configs/args_quickstart.json##g')"
install_segbundles dev,export,label

root=$PWD/bundles/$bundle
out=$PWD/output/quickstart/$bundle
rm -rf "$out"
mkdir -p "$out"
SECONDS=0

step() { # step TITLE NAME COMMAND...: show what the command prints, and keep it in a log
    local title=$1 log=$out/${number}_$2.log
    shift 2
    say "$number of $steps: $title ($SECONDS s so far)"
    number=$((number + 1))
    "$@" 2>&1 | tee "$log"
}
bundle_run() { # bundle_run ID CONFIG ARGUMENTS...
    local id=$1 config=$2
    shift 2
    echo "python -m monai.bundle run $id --config_file $config $*"
    # MONAI warns at every start that a config is code; docs say so
    PYTHONWARNINGS=ignore "$python" -m monai.bundle run "$id" --bundle_root "$root" --config_file "$config" \
        --dataset_dir "$out/data" --ckpt_dir "$out/models" "$@"
}

show() { # show PAGE: in the browser, if there is a screen
    echo "Open this page: $1"
    if [[ -t 1 && (-n ${DISPLAY:-}${WAYLAND_DISPLAY:-} || $(uname) == Darwin) ]]; then
        "$python" -m webbrowser -t "file://$1" >/dev/null 2>&1 || true
    fi
}

configs=$root/configs
steps=5
[[ -f $configs/train_locator.json ]] && steps=6
number=1

# the phantom is named like the start of the bundle: left_atrium for left_atrium_vnet, brain for brain_flair_unet
phantom=$bundle
until "$python" -m segbundles phantom "$phantom" --help >/dev/null 2>&1; do
    [[ $phantom == *_* ]] || die "there is no synthetic data for '$bundle': see segbundles phantom --help"
    phantom=${phantom%_*}
done
step "making synthetic data" data "$python" -m segbundles phantom "$phantom" --out "$out/data"
# one image, or the slices of one patient
read -r -d '' first <<'END' || true
import json, pathlib, sys
entry = json.loads(pathlib.Path(sys.argv[1], "datalist.json").read_text())["testing"][0]
image = pathlib.Path(sys.argv[1], entry["image"])
print(image.parent if "slice" in entry else image)
END
image=$("$python" -c "$first" "$out/data")
step "segmenting one image with the weights that come with the bundle" shipped \
    "$python" -m segbundles segment "$root" "$image" "$out/shipped"
show "$out/shipped/preview.html"
if [[ -f $configs/train_locator.json ]]; then
    step "training the locator" train_locator bundle_run training "$configs/train_locator.json" \
        --args_file "$configs/args_quickstart_locator.json" --output_dir "$out/training"
fi
step "training" train bundle_run training "$configs/train.json" \
    --args_file "$configs/args_quickstart.json" --output_dir "$out/training"
step "evaluating" evaluate bundle_run evaluating "['$configs/train.json','$configs/evaluate.json']" \
    --args_file "$configs/args_quickstart.json" --split testing --output_dir "$out/evaluation"
step "segmenting with the new weights" infer bundle_run inferring "$configs/inference.json" \
    --args_file "$configs/args_quickstart.json" --output_dir "$out/segmentations"

say "Done in $SECONDS s. Synthetic data and a short training: these figures say nothing about real images."
echo "first page        $out/shipped/preview.html"
echo "report            $out/evaluation/report.html"
echo "metrics           $out/evaluation/metrics.csv, summary.json"
echo "segmentations     $out/segmentations"
echo "weights           $out/models"
echo "training curves   tensorboard --logdir $out/training"
echo "Next: README.md, and section 1 of $root/configs/train.json"
