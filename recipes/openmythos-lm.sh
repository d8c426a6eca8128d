#!/usr/bin/env bash
# How the weights of `openmythos-lm` were made: first English, then the messages of presidents.
#
#     bash recipes/openmythos-lm.sh FOLDER
#
# On Debian (for apt-get and dpkg-deb), with `openmythos` installed; about two hours of one core
# that has AMX. Another processor, or another build of torch, ends with other digits.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
folder=${1:?the folder for texts, runs and the model}
mkdir -p "$folder/packages"
cd "$folder"

(cd packages && apt-get download sword-comm-tdavid sword-comm-mhcc sword-text-web r-cran-janeaustenr)
python "$here/public_domain_mix.py" packages mix

# The tokenizer is that of the messages: what is measured in the end is their text.
tokenizer=$here/../openmythos/weights/openmythos-lm/tokenizer.json

openmythos train --text mix --held-out 0.01 --tokenizer "$tokenizer" --run english --preset tiny \
  --model.vocab-size 4096 --model.hidden-size 256 --model.num-heads 4 --model.kv-heads 2 \
  --model.head-dim 64 --model.core-layers 2 --model.mean-loops 3 --model.lora-loops 3 \
  --model.feed-forward relu2 --model.feed-forward-size 1024 --model.experts 16 \
  --model.experts-per-token 2 --model.expert-size 256 --model.max-length 1024 \
  --model.embedding-scale 16 --model.logit-scale 0.70710678 \
  --steps 1800 --batch-size 16 --length 256 --depth near --optimizer.decay-share 0 \
  --optimizer.warmup-steps 100 --optimizer.muon-lr 0.02 --optimizer.adam-lr 5e-3 \
  --gate-steps 0 --evaluate-every 450 --precision bf16 --threads 1 --seed 0

openmythos train --start-from english --corpus sotu --run messages \
  --steps 1150 --batch-size 8 --length 512 --depth near --optimizer.decay-share 0.9 \
  --optimizer.warmup-steps 50 --optimizer.muon-lr 0.02 --optimizer.adam-lr 5e-3 \
  --evaluate-every 200 --precision bf16 --threads 1 --seed 0

openmythos export messages openmythos-lm --weights int8
