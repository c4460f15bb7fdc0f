#!/bin/sh
# Trains a pair from what training/luggage.sh packed: sh start.sh DEST SECONDS. Nothing but PyTorch, numpy, tokenizers
# and safetensors is needed. The time counts from here; DEST holds a usable pair's weights from half of it on.
begin=$(date +%s)
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1" "${WORK:=/tmp/train_pair}" && dest=$(cd "$1" && pwd) || exit 2
cd "$here/code" || exit 2
export PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
parts=${PARTS:-6}
part=0
while [ "$part" -lt "$parts" ]; do
    nice -n 5 "${PYTHON:-python3}" -m training.shards --text "$here/text.jsonl.xz" --tokenizer "$here/tokenizer.json" \
        --held "$here/held.json" --out "$WORK/shards" --part $part --parts "$parts" ${SHARDS:---shards 30} \
        >>"$WORK/shards.log" 2>&1 &
    makers="$makers $!"
    part=$((part + 1))
done
trap 'kill $trainer 2>/dev/null' TERM INT
OMP_NUM_THREADS="${THREADS:-4}" "${PYTHON:-python3}" -m training.minutes --shards "$WORK/shards" --tokenizer "$here/tokenizer.json" \
    --out "$dest" --work "$WORK" --seconds "$2" --begin "$begin" ${OPTIONS} >>"$dest/out.log" 2>&1 &
trainer=$!
wait $trainer
code=$?
[ $code -gt 128 ] && wait $trainer && code=0
kill $makers 2>/dev/null
[ $code -ne 0 ] && tail -n 20 "$WORK/shards.log" >>"$dest/out.log"
exit $code
