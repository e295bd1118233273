#!/bin/sh
# check_tool.sh DIR: the command line tool as people use it. The tool is DIR/../mil; everything is written under DIR.
# Each FAIL line is one check; the last line is `N passed, N failed`.
dir=$1
top=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$dir" && cd "$dir" || exit 1
mil=$(cd .. && pwd)/mil
rm -rf ./*
passed=0 failed=0

# ok NAME COMMAND...: it exits 0. What it says, if anything, is in out.txt; it is shown when it does not.
ok() {
    name=$1
    shift
    "$@" > now.txt 2>&1
    got=$?
    test -s now.txt && mv now.txt out.txt
    if [ $got = 0 ]; then passed=$((passed + 1)); return 0; fi
    echo "FAIL $name: $* (exit $got)"
    head -n 5 out.txt
    failed=$((failed + 1))
    return 1
}

# fails NAME STATUS TEXT COMMAND...: it exits with STATUS, says one line on stderr that holds TEXT (a grep pattern).
fails() {
    name=$1 status=$2 pattern=$3
    shift 3
    "$@" > out.txt 2> err.txt
    got=$?
    if [ $got = "$status" ] && grep -q -- "$pattern" err.txt && [ "$(grep -c -v warning err.txt)" = 1 ]; then passed=$((passed + 1)); return 0; fi
    echo "FAIL $name: $* (exit $got, not $status; or without '$pattern')"
    head -n 5 err.txt
    failed=$((failed + 1))
}

has() { grep -q -- "$2" "$1"; }

# npy FILE SHAPE OCTAL...: a uint8 array.
npy() {
    file=$1 shape=$2
    shift 2
    { printf '\223NUMPY\001\000\166\000'; printf '%-117s\n' "{'descr': '|u1', 'fortran_order': False, 'shape': $shape, }"; for byte; do printf "\\$byte"; done; } > "$file"
}

# ---- usage
fails 'an unknown command names the nearest' 2 'train' "$mil" trian
fails 'an unknown option names the nearest' 2 '--epochs' "$mil" train --epocs 3
fails 'an option without its value' 2 'needs a value' "$mil" train --data
fails 'a number out of range' 2 'epochs' "$mil" train --data x --model abmil --out y --epochs 0
fails 'a needed option' 2 '--out' "$mil" train --data x --model abmil
ok 'help' "$mil" --help
for command in models info check train eval score heatmap demo; do
    ok "help of $command" "$mil" $command --help
    ok "help of $command fits 80 columns" sh -c "awk 'length(\$0) > 80 { exit 1 }' out.txt"
done
ok 'models' "$mil" models
ok 'models NAME' "$mil" models abmil
ok 'a model shows its parameter count' has out.txt '920195 parameters'
fails 'a model that does not exist' 2 'abmil' "$mil" models abmill

# ---- cases
ok 'check replays cases' "$mil" check "$top"/tests/cases/millab-abmil-*.safetensors
ok 'check counts' has out.txt '^6 passed, 0 failed, 0 skipped$'
head -c 2000 "$top/tests/cases/millab-abmil-base-eval.safetensors" > broken.safetensors
ok 'check fails on a broken case' sh -c "! '$mil' check broken.safetensors > check.txt && grep -q '^FAIL broken' check.txt"

# ---- a cohort to work on
ok 'demo --data-only' "$mil" demo . --slides 24 --data-only
ok 'the cohort is the same again' sh -c "'$mil' demo again --slides 24 --data-only && cmp data/slide_007.safetensors again/data/slide_007.safetensors && cmp data/labels.csv again/data/labels.csv"
ok 'info' "$mil" info --values data/slide_000.safetensors
ok 'info lists tensors' has out.txt 'instance_labels'
fails 'info names a broken file' 1 'broken.safetensors' "$mil" info broken.safetensors
fails 'info names a missing file' 1 'nowhere.npy' "$mil" info nowhere.npy

# ---- training
small='--data data --model abmil --set embed_dim=16 --set attn_dim=8 --lr 1e-3 --quiet --bootstrap 50'
ok 'train' "$mil" train $small --out run --epochs 6 --test 0.25
for file in config.json splits.csv best.safetensors last.safetensors state.safetensors log.csv predictions.csv metrics.json; do
    ok "train writes $file" test -s run/$file
done
ok 'the log has a line per epoch' sh -c 'test $(wc -l < run/log.csv) = 7'
ok 'a finished run stays as it is' sh -c "cp run/state.safetensors before && '$mil' train $small --out run --epochs 6 --test 0.25 && cmp before run/state.safetensors"
fails 'another recipe is not mixed into a run' 1 'epochs' "$mil" train $small --out run --epochs 7 --test 0.25
fails '--resume needs a run' 1 'no run' "$mil" train $small --out nothing --epochs 6 --resume
ok 'threads do not change the bits' sh -c "'$mil' train $small --out one --epochs 3 --threads 1 && '$mil' train $small --out four --epochs 3 --threads 4 && cmp one/state.safetensors four/state.safetensors"
ok 'another seed changes them' sh -c "'$mil' train $small --out seed --epochs 3 --seed 1 && ! cmp -s one/last.safetensors seed/last.safetensors"
fails 'an unknown option of the model' 1 'embed_dim' "$mil" train --data data --model abmil --set embed_dimm=3 --out bad
fails 'an unknown option of the optimizer' 1 'accumulate' "$mil" train --data data --model abmil --optim acumulate=3 --out bad2
fails 'an unknown metric' 2 'auroc' "$mil" train --data data --model abmil --out bad --monitor aurc
ok 'balanced sampling and other metrics' "$mil" train $small --out balanced --epochs 2 --sampling balanced --monitor auroc --standardize --label-smoothing 0.1
ok 'no validation: the last epoch' "$mil" train $small --out noval --epochs 2 --val 0

# Killed at any moment, the run goes on to the same bits.
long="$small --epochs 60 --patience 0 --folds 2 --save-every 0"
ok 'a long run' "$mil" train $long --out whole
kills=0
for wait in 0.05 0.1 0.15 0.2 0.12 0.3; do
    "$mil" train $long --out killed > /dev/null 2>&1 &
    pid=$!
    sleep $wait
    kill -9 $pid 2> /dev/null && kills=$((kills + 1))
    wait $pid 2> /dev/null
    ok 'nothing is half-written after a kill' sh -c "test ! -e killed/fold_0/state.safetensors || '$mil' info killed/fold_0/state.safetensors"
done
ok 'the run was killed' test $kills -gt 0
ok 'a killed run goes on' "$mil" train $long --out killed
for file in predictions.csv metrics.json splits.csv fold_0/best.safetensors fold_0/last.safetensors fold_0/state.safetensors fold_0/log.csv fold_1/best.safetensors fold_1/log.csv; do
    ok "a killed run ends with the same $file" cmp whole/$file killed/$file
done

# ---- folds keep patients together and classes apart
ok 'cross-validation' "$mil" train $small --out cv --epochs 2 --folds 3
ok 'patients stay together' sh -c "awk -F, 'NR == FNR { patient[\$1] = \$3; next } \$3 == \"test\" { p = patient[\$1]; if (p in fold && fold[p] != \$2) exit 1; fold[p] = \$2 }' data/labels.csv cv/splits.csv"
ok 'each bag is tested once' sh -c "test \$(grep -c ',test\$' cv/splits.csv) = 24 && test \$(grep ',test\$' cv/splits.csv | cut -d, -f1 | sort -u | wc -l) = 24"
ok 'no bag is in two parts of a fold' sh -c "test \$(cut -d, -f1,2 cv/splits.csv | sort | uniq -d | wc -l) = 0"

# ---- eval
ok 'eval' "$mil" eval --data data --run run --json eval.json --predictions eval.csv --bootstrap 50
ok 'eval takes the test bags' has eval.json '"part":"test"'
ok 'eval agrees with train' sh -c "grep ',test,' run/predictions.csv | sort > a.txt && grep ',test,' eval.csv | sort | cmp - a.txt"
ok 'eval of a cross-validation' "$mil" eval --data data --run cv --bootstrap 50 --predictions eval_cv.csv
ok 'each bag by the fold that tested it' sh -c "test \$(grep -c ',test,' eval_cv.csv) = 24"
mkdir -p fresh && cp data/slide_00[0-5].safetensors fresh && for i in 0 1 2 3 4 5; do mv fresh/slide_00$i.safetensors fresh/new_$i.safetensors; done
{ echo 'bag,label'; for i in 0 1 2 3 4 5; do echo "new_$i,normal"; done; } > fresh/labels.csv
ok 'new bags are scored by all folds' sh -c "'$mil' eval --data fresh --run cv --bootstrap 50 --predictions fresh.csv > out2.txt && test \$(grep -c ',new,' fresh.csv) = 6"
sed 's/normal/strange/' fresh/labels.csv > strange.csv
fails 'a class that the model lacks' 1 'strange' "$mil" eval --data fresh --run cv --labels strange.csv
fails 'a run that is none' 1 'nothing' "$mil" eval --data data --run nothing

# ---- score
ok 'score' "$mil" score --weights run/best.safetensors --out scores.csv data/slide_000.safetensors data/slide_001.safetensors
ok 'score has a line per bag' sh -c 'test $(wc -l < scores.csv) = 3'
ok 'score of a folder as JSON lines' "$mil" score --weights run/best.safetensors --format jsonl fresh
ok 'JSON lines' sh -c 'test $(grep -c "^{\"bag\":\"new_.*\"predicted\":\"[nt]" out.txt) = 6'
ok 'score --attention' "$mil" score --weights run/best.safetensors --attention attention --out scores2.csv data/slide_000.safetensors
ok 'weights sum to 1' sh -c "awk -F, 'NR > 1 { sum += \$5 } END { exit !(sum > 0.999 && sum < 1.001) }' attention/slide_000.csv"
ok 'measures are named apart' sh -c "head -n 1 attention/slide_000.csv | grep -q 'instance,x,y,attention_score,attention_weight,attention_rank,contribution_normal,contribution_tumour'"
fails 'weights that are none' 1 'broken.safetensors' "$mil" score --weights broken.safetensors data/slide_000.safetensors
ok 'a failed score leaves no file' sh -c "! '$mil' score --weights run/best.safetensors --out gone.csv data/slide_000.safetensors broken.safetensors > /dev/null 2>&1; test ! -e gone.csv && test \$(ls | grep -c gone) = 0"

# ---- heatmap
ok 'heatmap into a folder' "$mil" heatmap --weights run/best.safetensors --out maps --geojson data/slide_001.safetensors data/slide_002.safetensors
ok 'a PNG' sh -c "head -c 4 maps/slide_001.png | tail -c 3 | grep -q PNG"
ok 'its JSON says where it lies' has maps/slide_001.json '"level0":{"x":'
ok 'its JSON says which map' has maps/slide_001.json '"map":"contribution","class":"tumour"'
ok 'tiles for QuPath' sh -c "test \$(grep -c '\"objectType\":\"tile\"' maps/slide_001.geojson) -gt 50"
for map in margin rank weight score; do ok "heatmap --map $map" "$mil" heatmap --weights run/best.safetensors --out map_$map.png --map $map data/slide_001.safetensors; done
ok 'a zoom that is given' "$mil" heatmap --weights run/best.safetensors --out zoom.png --zoom 1 --class normal data/slide_001.safetensors
fails 'a wrong step' 1 'step' "$mil" heatmap --weights run/best.safetensors --out step.png --step 0.1 data/slide_001.safetensors
ok 'patches off the grid are said' sh -c "'$mil' heatmap --weights run/best.safetensors --out off.png --step 700 data/slide_001.safetensors 2>&1 | grep -q 'do not lie on the grid'"
ok 'an overlap is said' sh -c "'$mil' heatmap --weights run/best.safetensors --out off.png --patch-size 1024 data/slide_001.safetensors 2>&1 | grep -q overlap"
fails 'a class that the model lacks' 2 'tumour' "$mil" heatmap --weights run/best.safetensors --out x.png --class tumor data/slide_001.safetensors

# ---- labels as people have them
mkdir -p odd && for i in 0 1 2 3 4 5 6 7; do cp data/slide_00$i.safetensors "odd/slide $i.safetensors"; done
{ printf '\357\273\277"slide_id";"Label";"case_id"\r\n'; for i in 0 1 2 3 4 5 6; do printf '"slide %s.svs"; "class ""%s"""; p%s\r\n' $i $((i % 2)) $i; done; printf 'lost.svs;"class ""1""";p9\r\n'; } > odd/labels.csv
ok 'byte order mark, semicolons, quotes, CRLF, other endings' "$mil" train --data odd --model abmil --set embed_dim=8 --set attn_dim=4 --epochs 1 --out odd_run --quiet --bootstrap 20 --folds 2
ok 'a bag without features is named' has out.txt "no features for bag 'lost.svs'"
ok 'features without a label are named' has out.txt "no line for the features 'slide 7.safetensors'"
ok 'words are classes' has odd_run/predictions.csv 'probability_class ""1""'
bad_labels() {
    printf "$3" > bad.csv
    fails "$1" 1 "$2" "$mil" train --data odd --labels bad.csv --model abmil --out bad_run
}
bad_labels 'an empty table' 'bad.csv: the table is empty' ''
bad_labels 'no column of bags' "no column 'bag'" 'a,b\n1,2\n'
bad_labels 'a bag twice' 'line 3' 'bag,label\nslide 1,x\nslide 1,y\n'
bad_labels 'too many fields' 'line 2 has 3 fields' 'bag,label\nslide 1,x,y\n'
bad_labels 'an open quote' 'line 2' 'bag,label\n"slide 1,x\n'
bad_labels 'an unknown split' 'split' 'bag,label,split\nslide 1,x,holdout\n'
bad_labels 'a fold that is no number' 'fold' 'bag,label,fold\nslide 1,x,one\n'
bad_labels 'one class only' 'classes' 'bag,label\nslide 1,x\nslide 2,x\nslide 3,x\n'
fails 'a folder without labels' 1 'labels.csv' "$mil" train --data fresh/.. --model abmil --out bad_run
fails 'no such folder' 1 'nowhere' "$mil" train --data nowhere --model abmil --out bad_run

# ---- packed sets
mkdir -p packed
npy packed/features.npy '(12, 2)' 1 2 3 4 5 6 7 10 11 12 13 14 1 2 3 4 5 6 7 10 11 12 13 14
npy packed/bag.npy '(12,)' 0 0 1 1 2 2 3 3 4 4 5 5
npy packed/labels.npy '(6,)' 0 1 0 1 0 1
npy packed/folds.npy '(1, 6)' 0 0 1 1 2 2
ok 'a packed set with its own folds' "$mil" train --data packed --model abmil --set embed_dim=4 --set attn_dim=4 --epochs 1 --out packed_run --folds data --val 0 --quiet --bootstrap 20
npy packed/bag.npy '(12,)' 0 0 1 1 2 2 3 3 4 4 5 7
fails 'a bag number without a label' 1 'bag.npy' "$mil" train --data packed --model abmil --out bad_run
npy packed/bag.npy '(11,)' 0 0 1 1 2 2 3 3 4 4 5
fails 'a bag index of the wrong length' 1 'bag.npy' "$mil" train --data packed --model abmil --out bad_run
npy slide.npy '(3, 64)' $(awk 'BEGIN { for (i = 0; i < 192; i++) printf "%o ", i % 64 }')
ok 'an NPY file as a bag' "$mil" score --weights run/best.safetensors slide.npy
fails 'a heatmap without coordinates' 1 'no coordinates' "$mil" heatmap --weights run/best.safetensors --out x.png slide.npy
npy narrow.npy '(1, 3)' 1 2 3
fails 'features of another width' 1 'narrow.npy: features have width 3, the model takes 64' "$mil" score --weights run/best.safetensors narrow.npy

ok 'no temporary file is left' sh -c "test -z \"\$(find . -name '*.tmp*' -o -name '.*.??????')\""
echo "$passed passed, $failed failed"
[ $failed = 0 ]
