#!/usr/bin/env bash
# Completes a few prompts, with the arguments of MindFormers' script of this name.
#
#   run_llama3_predict.sh single   CONFIG_PATH CKPT_PATH VOCAB_FILE
#   run_llama3_predict.sh parallel CONFIG_PATH CKPT_PATH VOCAB_FILE DEVICE_NUM
#
# CKPT_PATH is a weight file or a model directory. parallel starts the DEVICE_NUM ranks of the file's parallel_config on this
# machine, and prints what rank 0 said when they have ended. Environment: PREDICT_DATA is a prompt of your own, or a text
# file with a prompt a line; PYTHON names the interpreter; MASTER_PORT (8118) and LOG_DIR (output/msrun_log) of parallel.

set -u

usage() {
  sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
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
    ;;
  *) usage ;;
esac

if [ -n "${PREDICT_DATA:-}" ]; then
  prompts=("$PREDICT_DATA")
else
  prompts=("I love Beijing, because" "LLaMA is a" "Huawei is a company that")
fi
command=("${PYTHON:-python}" "$here/run_llama3_1.py" --run_mode predict
  --config "$config" --load_checkpoint "$checkpoint" --vocab_file "$vocabulary")
if [ "$kind" = single ]; then
  exec "${command[@]}" --use_parallel False --predict_data "${prompts[@]}"
fi
program=$(printf '%q ' "${command[@]}" --use_parallel True --auto_trans_ckpt True --predict_data "${prompts[@]}")
log_dir=${LOG_DIR:-output/msrun_log}
bash "$here/msrun_launcher.sh" "$program" "$5" "${MASTER_PORT:-8118}" "$log_dir" True 7200 || exit
cat "$log_dir${MF_LOG_SUFFIX:+_$MF_LOG_SUFFIX}/worker_0.log"
