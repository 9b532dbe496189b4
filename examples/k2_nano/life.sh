#!/usr/bin/env bash
# A small K2 goes through everything Kimi K2 went through, on two CPU cores, in one sitting.
# Stop it any time; the same command goes on. Then open OUT/report.html.
#   examples/k2_nano/life.sh [OUT] [FLAGS of tools/life.py]
#
#    1 corpus         Python's library, declarations of tools, invented people
#    2 tokenizer      a vocabulary of Kimi's construction
#    3 rephrase       the people in other words, facts checked
#    4 pretrain       MuonClip
#    5 long-context   annealing, then eight times the length with YaRN
#    6 export         Hugging Face and back, every byte
#    7 synthesize     agents, tasks, dialogues with tools, judged
#    8 sft            calls that their declarations allow
#    9 rl             verified words, and the policy as its own critic
#   10 evaluate       tools and exact answers
#   11 serve          OpenAI's client asks for a tool
#
#   examples/k2_nano/life.sh out/life --list              what is done
#   examples/k2_nano/life.sh out/life --until sft         a part of it
#   examples/k2_nano/life.sh out/life --from rl           that stage again, and those after it
set -euo pipefail
cd "$(dirname "$0")/../.."
out=out/life
if [[ $# -gt 0 && $1 != -* ]]; then
  out=$1
  shift
fi
exec "${PYTHON:-.venv/bin/python}" tools/life.py --out "$out" "$@"
