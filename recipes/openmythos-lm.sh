#!/usr/bin/env bash
# How the weights of `openmythos-lm` were made: English, the messages of presidents, and once more.
#
#     bash recipes/openmythos-lm.sh FOLDER
#
# On Debian (for apt-get and dpkg-deb), with `openmythos` installed. The first two parts take seven
# minutes of one H200, or seven hours of one core; the other two, an hour of one core that has AMX.
# Another processor, or another build of torch, ends with other digits.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ $# -ne 1 ]; then
  echo "usage: bash recipes/openmythos-lm.sh FOLDER   (for texts, runs and the model)" >&2
  exit 2
fi
folder=$1
mkdir -p "$folder/packages"
cd "$folder"

(cd packages && apt-get download sword-comm-tdavid sword-comm-mhcc sword-text-web r-cran-janeaustenr)
python "$here/public_domain_mix.py" packages mix
mkdir -p other && cp mix/*.jsonl other && rm other/sotu.jsonl

# The tokenizer is that of the messages: what is measured in the end is their text.
tokenizer=$here/../openmythos/weights/openmythos-lm/tokenizer.json
common=(--optimizer.muon-lr 0.02 --optimizer.adam-lr 5e-3 --depth near --precision bf16)

openmythos train --text mix --held-out 0.01 --tokenizer "$tokenizer" --run english --preset tiny \
  --model.vocab-size 4096 --model.hidden-size 256 --model.num-heads 4 --model.kv-heads 2 \
  --model.head-dim 64 --model.core-layers 2 --model.mean-loops 3 --model.lora-loops 3 \
  --model.feed-forward relu2 --model.feed-forward-size 1024 --model.experts 16 \
  --model.experts-per-token 2 --model.expert-size 256 --model.max-length 1024 \
  --model.embedding-scale 16 --model.logit-scale 0.70710678 --model.gate-size 0 \
  --steps 2919 --batch-size 64 --length 256 --optimizer.decay-share 0 \
  --optimizer.warmup-steps 100 --gate-steps 0 --evaluate-every 500 --seed 0 "${common[@]}"

# Too often: after 1,000 of these steps, 6.2 readings, the messages are known by heart.
openmythos train --start-from english --corpus sotu --run by-heart \
  --steps 1000 --batch-size 32 --length 512 --optimizer.decay-share 0.9 \
  --optimizer.warmup-steps 50 --evaluate-every 200 --seed 0 "${common[@]}"

# What was known by heart goes where other texts are read at full rate; what was learnt of English stays.
openmythos export by-heart halves --weights bf16
openmythos train --start-from halves --text other --held-out 0.01 --run other-again \
  --steps 427 --batch-size 16 --length 256 --optimizer.decay-share 0 \
  --optimizer.warmup-steps 50 --gate-steps 0 --evaluate-every 1000 --seed 1 "${common[@]}"

openmythos train --start-from other-again --corpus sotu --run messages \
  --steps 1000 --batch-size 8 --length 512 --optimizer.decay-share 0.9 \
  --optimizer.warmup-steps 20 --evaluate-every 100 --seed 1 "${common[@]}"

openmythos export messages openmythos-lm --weights int8
