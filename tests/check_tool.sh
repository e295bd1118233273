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
for model in $("$mil" models | sed -n 's/^\([a-z0-9_]*\)\..*/\1/p' | sort -u); do
    ok "models $model fits 80 columns" sh -c "'$mil' models $model > model.txt && awk 'length(\$0) > 80 { exit 1 }' model.txt"
done
fails 'a misspelt --version' 2 '--version' "$mil" --verson
fails 'an option that is given nothing' 2 '--data' "$mil" train --data '' --model abmil --out y
ok 'models NAME' "$mil" models abmil
ok 'a model shows its parameter count' has out.txt '920195 parameters'
fails 'a model that does not exist' 2 'abmil' "$mil" models abmill

# ---- cases
ok 'check replays cases' "$mil" check "$top"/tests/cases/millab-abmil-*.safetensors
ok 'check counts' has out.txt "^$(ls "$top"/tests/cases/millab-abmil-*.safetensors | wc -l | tr -d ' ') passed, 0 failed, 0 skipped$"
head -c 2000 "$top/tests/cases/millab-abmil-base-eval.safetensors" > broken.safetensors
mkdir -p nothing_here
fails 'check of a folder without cases proves nothing' 1 'no cases' "$mil" check nothing_here
ok 'check fails on a broken case' sh -c "! '$mil' check broken.safetensors > check.txt && grep -q '^FAIL broken' check.txt"

# ---- a cohort to work on
ok 'demo --data-only' "$mil" demo . --slides 24 --data-only
ok 'the cohort is the same again' sh -c "'$mil' demo again --slides 24 --data-only && cmp data/slide_007.safetensors again/data/slide_007.safetensors && cmp data/labels.csv again/data/labels.csv"
ok 'info' "$mil" info --values data/slide_000.safetensors
ok 'info lists tensors' has out.txt 'instance_labels'
fails 'info names a broken file' 1 'broken.safetensors' "$mil" info broken.safetensors
fails 'info names a missing file' 1 'nowhere.npy' "$mil" info nowhere.npy
# tensors FILE HEADER BYTES: a safetensors file with this header and so many zero bytes of data (fewer than 256 bytes of header).
tensors() {
    { printf "\\$(printf %o ${#2})\\0\\0\\0\\0\\0\\0\\0"; printf %s "$2"; head -c "$3" /dev/zero; } > "$1"
}
tensors foreign.safetensors '{"a":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]}}' 2
ok 'info lists a dtype of the format that is not read' "$mil" info foreign.safetensors
tensors unknown.safetensors '{"a":{"dtype":"f32","shape":[2],"data_offsets":[0,8]}}' 8
fails 'info names a dtype that does not exist' 1 "unknown.safetensors: tensor 'a': 'f32'" "$mil" info unknown.safetensors
tensors escapes.safetensors '{"a\u001b[31m\nb":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"__metadata__":{"k\u001b[2J":"v\u001b[2J"}}' 2
ok 'info keeps control characters from the terminal' sh -c "'$mil' info escapes.safetensors > out.txt && ! grep -q '$(printf '\033')' out.txt && test \$(wc -l < out.txt) = 3"
line=$(printf 'a\nb')
printf abc > "$line.safetensors"
fails 'a line feed in a file name makes no second line' 1 'a?b.safetensors' "$mil" info "$line.safetensors"
rm "$line.safetensors"

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
fails 'an unknown option of the model' 2 'embed_dim' "$mil" train --data data --model abmil --set embed_dimm=3 --out bad
fails 'an unknown option of the optimizer' 2 'accumulate' "$mil" train --data data --model abmil --optim acumulate=3 --out bad2
fails 'the optimizer is looked at before a run is made' 2 'adamw' "$mil" train --data data --model abmil --optimizer adamm --out bad2
ok 'a refused run leaves nothing' sh -c "test ! -e bad && test ! -e bad2"
fails 'a wrong option does not remove the run that is there' 2 'embed_dim' "$mil" train $small --out run --overwrite --set embed_dimm=3
ok 'the run is still there' test -s run/state.safetensors
fails 'the number of resamples is looked at first' 2 'bootstrap' "$mil" train $small --out bad --bootstrap 1
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

# Ctrl-C: what was being written is removed, and the run goes on later.
"$mil" train $long --out asked > /dev/null 2> err.txt &
pid=$!
sleep 0.3
kill -TERM $pid 2> /dev/null
wait $pid 2> /dev/null
ok 'a run that is asked to stop leaves no temporary file' sh -c "test -z \"\$(find asked -name '*.tmp')\""
ok 'a stopped run goes on' "$mil" train $long --out asked
ok 'a stopped run ends with the same state' cmp whole/fold_1/state.safetensors asked/fold_1/state.safetensors

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
cp -R run hurt && printf 'bag,fold,split\nslide_000,0,banana\n' > hurt/splits.csv
fails 'the splits of a run, damaged' 1 "splits.csv: line 2: split 'banana'" "$mil" eval --data data --run hurt
head -c 3000 run/state.safetensors > hurt/state.safetensors && cp run/splits.csv hurt
fails 'the state of a run, damaged' 1 'hurt/state.safetensors' "$mil" train $small --out hurt --epochs 6 --test 0.25
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
fails '--set without --model' 2 '--model' "$mil" score --weights run/best.safetensors --set embed_dim=4 data/slide_000.safetensors
fails 'a model that does not exist, for score' 2 'abmil' "$mil" score --weights run/best.safetensors --model abmill data/slide_000.safetensors
fails 'a folder without bags' 1 'nothing_here' "$mil" score --weights run/best.safetensors nothing_here
mkdir -p twin && cp data/slide_001.safetensors twin/slide_000.safetensors
fails 'two bags of one name' 1 'twin/slide_000' "$mil" score --weights run/best.safetensors --attention twins data/slide_000.safetensors twin/slide_000.safetensors
fails 'two pictures of one name' 1 'twin/slide_000' "$mil" heatmap --weights run/best.safetensors --out twins data/slide_000.safetensors twin/slide_000.safetensors
cp data/slide_000.safetensors "$(printf 'sur\355\240\200 long\340\200\257 "q" \303\251.safetensors')"
ok 'JSON lines are UTF-8, whatever a file is called' sh -c "'$mil' score --weights run/best.safetensors --format jsonl sur* | grep -q '^{\"bag\":\"sur??? long??? ..q.. $(printf '\303\251')\"'"
rm sur*
mkdir -p attention/slide_001.csv
ok 'a failed table of instances leaves no file' sh -c "! '$mil' score --weights run/best.safetensors --out gone.csv --attention attention data/slide_001.safetensors > /dev/null 2>&1; test \$(ls | grep -c gone) = 0"
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
ok 'the name of the picture is taken as it is' sh -c "'$mil' heatmap --weights run/best.safetensors --out Upper.PNG data/slide_001.safetensors && test -s Upper.PNG && test -s Upper.json"
fails 'an offset that is no number' 2 'offset' "$mil" heatmap --weights run/best.safetensors --out x.png --geojson --offset nan,0 data/slide_001.safetensors
fails 'a picture that is too large names its bag' 1 'slide_001.safetensors.*zoom' "$mil" heatmap --weights run/best.safetensors --out x.png --step 16 --zoom 256 data/slide_001.safetensors
ok 'none of these left a picture' test ! -e x.png
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
table() {
    name=$1
    shift
    printf "$@" > table.csv
    ok "$name" "$mil" train --data odd --labels table.csv --model abmil --set embed_dim=8 --set attn_dim=4 --epochs 1 --out table_run --overwrite --quiet --bootstrap 20
}
table 'empty lines before the header' '\n\r\nbag;label\nslide 1;x\nslide 2;y\n\nslide 3;x\nslide 4;y\n'
table 'the separator named as Excel does' 'sep=;\r\nbag;label\r\nslide 1;x\r\nslide 2;y\r\nslide 3;x\r\nslide 4;y\r\n'
table 'numbers and words as classes' 'bag,label\nslide 1,1e1\nslide 2,1f\nslide 3,9\nslide 4,1f\nslide 5,9\nslide 6,1e1\n'
ok 'each class once' sh -c "head -n 1 table_run/predictions.csv | grep -q 'predicted,probability_9,probability_1e1,probability_1f,logit_0,logit_1,logit_2'"
table 'a bag without a split' 'bag,label,split\nslide 1,x,train\nslide 2,y,train\nslide 3,x,test\nslide 4,y,\n'
ok 'is named' has out.txt "'slide 4' has no split"
printf 'bag,label,fold\nslide 1,x,1\nslide 2,y,1\nslide 3,x,2\nslide 4,y,2\nslide 5,x,7\nslide 6,y,7\n' > folds.csv
ok 'folds from 1, with gaps' "$mil" train --data odd --labels folds.csv --folds data --model abmil --set embed_dim=8 --set attn_dim=4 --epochs 1 --out gaps --quiet --bootstrap 20
ok 'are said' has out.txt 'its 3 folds are numbered 1 to 7; here they are 0 to 2'
ok 'and are three' sh -c 'test -d gaps/fold_2 && test ! -e gaps/fold_3'
printf 'bag,label,patient\nslide 1,x,p\nslide 2,y,q\nslide 3,x,p\nslide 4,y,q\n' > few.csv
fails 'more folds than patients' 1 'fewer patients' "$mil" train --data odd --labels few.csv --folds 3 --model abmil --out bad_run
bad_labels 'a separator that cannot be one' 'line 3 has 2 fields' 'sep=\n\nbag,label\nslide 1,x\n'
bad_labels 'two columns of one name' "two columns are called 'label'" 'bag,label,label\nslide 1,x,y\n'
bad_labels 'a label in Latin-1' 'bad.csv: line 2: .*UTF-8' 'bag,label\nslide 1,caf\351\nslide 2,y\n'
bad_labels 'a single bag' "all labels are 'x'" 'bag,label\nslide 1,x\n'
bad_labels 'an empty table' 'bad.csv: the table is empty' ''
bad_labels 'no column of bags' "no column 'bag'" 'a,b\n1,2\n'
bad_labels 'a bag twice' 'line 3' 'bag,label\nslide 1,x\nslide 1,y\n'
bad_labels 'too many fields' 'line 2 has 3 fields' 'bag,label\nslide 1,x,y\n'
bad_labels 'an open quote' 'line 2' 'bag,label\n"slide 1,x\n'
bad_labels 'an unknown split' 'split' 'bag,label,split\nslide 1,x,holdout\n'
bad_labels 'a fold that is no number' 'fold' 'bag,label,fold\nslide 1,x,one\n'
bad_labels 'one class only' 'classes' 'bag,label\nslide 1,x\nslide 2,x\nslide 3,x\n'
ok 'a refused table leaves no run' test ! -e bad_run
fails 'a folder without labels' 1 'labels.csv' "$mil" train --data fresh/.. --model abmil --out bad_run
fails 'no such folder' 1 'nowhere' "$mil" train --data nowhere --model abmil --out bad_run

# ---- packed sets
mkdir -p packed
npy packed/features.npy '(12, 2)' 1 2 3 4 5 6 7 10 11 12 13 14 1 2 3 4 5 6 7 10 11 12 13 14
npy packed/bag.npy '(12,)' 0 0 1 1 2 2 3 3 4 4 5 5
npy packed/labels.npy '(6,)' 0 1 0 1 0 1
npy packed/folds.npy '(1, 6)' 0 0 1 1 2 2
ok 'a packed set with its own folds' "$mil" train --data packed --model abmil --set embed_dim=4 --set attn_dim=4 --epochs 1 --out packed_run --folds data --val 0 --quiet --bootstrap 20
{ printf '\223NUMPY\001\000\166\000'; printf '%-117s\n' "{'descr': '|i1', 'fortran_order': False, 'shape': (1, 6), }"; printf '\000\000\001\001\377\377'; } > packed/folds.npy
fails 'a fold below 0' 1 "bag '4' has fold -1" "$mil" train --data packed --model abmil --folds data --out bad_run
npy packed/folds.npy '(6, 1)' 0 0 1 1 2 2
fails 'folds the wrong way round' 1 'folds.npy: its last axis is 1, not the 6 bags' "$mil" train --data packed --model abmil --folds data --out bad_run
npy packed/folds.npy '(1, 6)' 0 0 1 1 2 2
npy packed/bag.npy '(12,)' 0 0 1 1 2 2 3 3 4 4 4 4
ok 'a bag without rows is named' sh -c "'$mil' train --data packed --model abmil --set embed_dim=4 --set attn_dim=4 --epochs 1 --out sparse_run --quiet --bootstrap 20 2>&1 | grep -q 'bag 5 has no instances'"
npy packed/bag.npy '(12,)' 0 0 1 1 2 2 3 3 4 4 5 7
fails 'a bag number without a label' 1 'bag.npy' "$mil" train --data packed --model abmil --out bad_run
npy packed/bag.npy '(11,)' 0 0 1 1 2 2 3 3 4 4 5
fails 'a bag index of the wrong length' 1 'bag.npy' "$mil" train --data packed --model abmil --out bad_run
npy slide.npy '(3, 64)' $(awk 'BEGIN { for (i = 0; i < 192; i++) printf "%o ", i % 64 }')
ok 'an NPY file as a bag' "$mil" score --weights run/best.safetensors slide.npy
fails 'a heatmap without coordinates' 1 'no coordinates' "$mil" heatmap --weights run/best.safetensors --out x.png slide.npy
npy narrow.npy '(1, 3)' 1 2 3
fails 'features of another width' 1 'narrow.npy: features have width 3, the model takes 64' "$mil" score --weights run/best.safetensors narrow.npy

"$mil" demo small_demo --slides 24 > small_demo.txt 2>&1
ok 'the demo ends with the command for the user'\''s own folder' grep -q 'build/mil train --data YOUR_FOLDER' small_demo.txt
ok 'and leaves pictures' sh -c 'ls small_demo/heatmaps/*_panel.png'

ok 'no temporary file is left' sh -c "test -z \"\$(find . -name '*.tmp*' -o -name '.*.??????')\""
echo "$passed passed, $failed failed"
[ $failed = 0 ]
