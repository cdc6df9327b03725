#!/usr/bin/env bash
# The tests of the hosts' integrations against the real packages, each in an environment of its own.
#
#   bash tests/hosts.sh                    all of them, in .venv-hosts/<host>; about 2 GB of disk each
#   bash tests/hosts.sh verl openrlhf      these alone
#
# A host is installed without what it pins, with what its trainer imports: its own requirements conflict with one another
# and want CUDA builds (flash-attn, vLLM). Some pins are kept, where another release would not work.
# LOGITLESS_HOSTS_VENV names another folder, LOGITLESS_TORCH pip's arguments for PyTorch.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

root=${LOGITLESS_HOSTS_VENV:-.venv-hosts}
export PYTHONPATH="$PWD/python" PYTHONDONTWRITEBYTECODE=1

host_package() {
    case $1 in
        axolotl) echo axolotl==0.19.0 ;;
        lightning) echo lightning==2.6.6 ;;
        llamafactory) echo llamafactory==0.9.5 ;;
        openrlhf) echo openrlhf==0.11.2 ;;
        swift) echo ms-swift==4.6.0 ;;
        torchtitan) echo torchtitan==0.3.0 ;;
        torchtune) echo torchtune==0.6.1 ;;
        verl) echo verl==0.9.1 ;;
        *) echo "no host is named $1" >&2; return 1 ;;
    esac
}

# What its trainer's modules import.
host_needs() {
    case $1 in
        axolotl) echo transformers==5.16.1 trl==1.9.0 accelerate==1.13.0 datasets==4.8.4 peft==0.20.0 pydantic==2.12.5 \
            addict fire requests einops colorama evaluate scipy art python-dotenv schedulefree mistral-common==1.11.5 \
            zstandard fastcore posthog==6.7.11 sentencepiece tensorboard axolotl-contribs-lgpl axolotl-contribs-mit \
            wandb numba triton ;;
        lightning) echo transformers accelerate lightning-utilities torchmetrics fsspec pytorch-lightning ;;
        llamafactory) echo transformers==5.6.0 trl==0.24.0 datasets==4.0.0 peft==0.18.1 accelerate==1.11.0 omegaconf fire \
            pydantic "tyro<0.9" matplotlib pandas scipy sentencepiece tiktoken einops modelscope hf-transfer \
            torchdata==0.11.0 av protobuf ;;
        openrlhf) echo transformers==5.15.0 accelerate datasets einops peft optree torchdata torchmetrics jsonlines \
            loralib sympy tensorboard pylatexenc deepspeed==0.19.6 ;;
        swift) echo transformers==5.19.0 "trl<1.0" "datasets<4.8.5" "peft<0.21" accelerate addict modelscope json-repair \
            dacite einops pandas matplotlib simplejson sortedcontainers tensorboard tiktoken sentencepiece openai oss2 \
            fastapi uvicorn aiohttp binpacking zstandard rouge nltk attrdict importlib-metadata \
            transformers-stream-generator ;;
        torchtitan) echo torchdata "datasets<4.8" tokenizers tyro tensorboard einops pillow spmd_types==0.2.3 \
            torch_checkpointing triton transformers accelerate ;;
        torchtune) echo torchdata==0.11.0 datasets tiktoken blobfile omegaconf psutil Pillow kagglehub sentencepiece \
            transformers ;;
        verl) echo "transformers<5.11" accelerate codetiming datasets dill hydra-core pandas peft pyarrow torchdata \
            "tensordict<=0.10.0" ray pylatexenc ;;
    esac
}

make_environment() {
    local venv="$root/$1" pip needs
    pip="$venv/bin/python -m pip install -qq --disable-pip-version-check"
    [ -x "$venv/bin/python" ] || python3 -m venv "$venv"
    needs=$(host_needs "$1")
    set -f # a pattern in a requirement, such as <5, is no file name
    $pip ${LOGITLESS_TORCH:-torch==2.13.0}
    $pip --no-deps "$(host_package "$1")"
    [ "$1" != torchtune ] || $pip --no-deps torchao==0.17.0 # older ones do not import beside this PyTorch
    $pip $needs numpy packaging safetensors pyyaml typer rich pytest hypothesis
    set +f
}

hosts=("$@")
[ ${#hosts[@]} -gt 0 ] || hosts=(axolotl lightning llamafactory openrlhf swift torchtitan torchtune verl)
for host in "${hosts[@]}"; do
    make_environment "$host"
    echo "== $(host_package "$host")"
    "$root/$host/bin/python" -m pytest "tests/test_host_$host.py" -k "not stub" -m "slow or not slow"
done
