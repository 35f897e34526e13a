#!/usr/bin/env bash
# Completes a few prompts, with the arguments of MindFormers' script of this name.
#
#   run_llama3_predict.sh single   CONFIG_PATH CKPT_PATH VOCAB_FILE
#   run_llama3_predict.sh parallel CONFIG_PATH CKPT_PATH VOCAB_FILE DEVICE_NUM
#
# CKPT_PATH is a weight file or a model directory. Environment: PREDICT_DATA is a prompt of your own, or a text file with a
# prompt a line; PYTHON names the interpreter.

set -u

usage() {
  sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

[ $# -ge 4 ] || usage
kind=$1 config=$2 checkpoint=$3 vocabulary=$4
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

case $kind in
  single)
    [ $# -eq 4 ] || usage
    ;;
  parallel)
    [ $# -eq 5 ] || usage
    echo "run_llama3_predict.sh: error: prediction runs on one device, not on $5; use single" >&2
    exit 1
    ;;
  *) usage ;;
esac

if [ -n "${PREDICT_DATA:-}" ]; then
  prompts=("$PREDICT_DATA")
else
  prompts=("I love Beijing, because" "LLaMA is a" "Huawei is a company that")
fi
exec "${PYTHON:-python}" "$here/run_llama3_1.py" --run_mode predict --use_parallel False \
  --config "$config" --load_checkpoint "$checkpoint" --vocab_file "$vocabulary" --predict_data "${prompts[@]}"
