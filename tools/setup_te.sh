#!/usr/bin/env bash
# Builds Transformer Engine, the extra `te` of setup.py, into .venv-te beside .venv, once.
# .venv-te sees .venv's packages through a .pth file, so that torch is not installed twice. A marker
# written last names what the build depends on; anything else starts over. After an interruption
# pip's downloads and a wheel already built are kept. Needs CUDA 13's nvcc and about half an hour of
# one core for 33 files: MAX_JOBS=4 compiles four at once. Nothing of it needs a GPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { printf 'error: %s\n' "$@" >&2; exit 1; }
sha() { if command -v sha256sum >/dev/null; then sha256sum; else shasum -a 256; fi; }

[[ -x .venv/bin/python ]] || fail ".venv is missing; run make setup first"
base=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
mapfile -t requirements < <(.venv/bin/python -c '
from importlib.metadata import requires
marker = "extra == \"te\""
print("\n".join(r.split(";")[0].strip() for r in requires("megatron-k2") if marker in r))')
[[ -n "${requirements[0]:-}" ]] || fail "setup.py has no extra te; run make setup again"
versions=$(.venv/bin/python -c 'import sys; from importlib.metadata import version
print("Python", sys.version.split()[0], "torch", version("torch"))')
key=$({ pwd -P; echo "$versions" "${requirements[@]}"; } | sha)
key=${key%% *}

exec 9>.setup.lock-te
flock -n 9 || { echo "set-up: another make builds Transformer Engine; waiting"; flock 9; }
[[ "$(cat .venv-te/.setup-complete 2>/dev/null)" == "$key" ]] && exit 0
if [[ -d .venv-te && "$(cat .venv-te/.setup-started 2>/dev/null)" != "$key" ]]; then
    echo "set-up: .venv-te was made for other versions; making it anew"
    rm -rf .venv-te
fi

cuda=$(.venv/bin/python -c 'import torch; print(torch.version.cuda)')
[[ "$cuda" == 13.* ]] || fail "the extra te is for CUDA 13; .venv's torch was built for CUDA $cuda"

# CUDA_HOME, nvcc on PATH, or the pip toolkit beside torch. nvcc is asked for its own folder: on
# PATH it can be a link or a script that runs another.
find_cuda_home() {
    local nvcc
    for nvcc in "${CUDA_HOME:+$CUDA_HOME/bin/nvcc}" "$(command -v nvcc || true)" \
        "$base/nvidia/cu13/bin/nvcc" /usr/local/cuda/bin/nvcc; do
        [[ -n "$nvcc" && -x "$nvcc" ]] || continue
        nvcc=$("$nvcc" --dryrun -E none.cu 2>&1 | sed -n 's/^#\$ _HERE_=//p')
        [[ -x "$nvcc/nvcc" ]] && dirname "$nvcc" && return 0
    done
    return 1
}
CUDA_HOME=$(find_cuda_home) || fail \
    "no nvcc: Transformer Engine's torch extension is compiled against the CUDA 13 toolkit" \
    "install NVIDIA's toolkit and put nvcc on PATH, or name its folder: CUDA_HOME=... make test-te" \
    "or take pip's: .venv/bin/python -m pip install 'cuda-toolkit[nvcc,cccl]==13.0.*'"
release=$("$CUDA_HOME/bin/nvcc" --version | sed -n 's/.*release \([0-9.]*\),.*/\1/p')
[[ "$release" == 13.* ]] || fail "$CUDA_HOME is CUDA ${release:-of no version}, CUDA 13 is needed"
free_mb=$(df -Pm . | awk 'NR == 2 { print $4 }')
[[ $free_mb -ge 4000 ]] || fail "$free_mb MB free in $PWD, 4000 MB needed"

mkdir -p .venv-te
echo "$key" >.venv-te/.setup-started
[[ -x .venv-te/bin/python ]] || .venv/bin/python -m venv --without-pip .venv-te
# addsitedir also reads the .pth files in there: the checkout's own packages are installed by one.
own=$(.venv-te/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "import site; site.addsitedir('$base')" >"$own/packages_of_venv.pth"
includes=$(printf '%s:' "$base"/nvidia/*/include)
export CUDA_HOME CUDA_PATH=$CUDA_HOME PATH=$PWD/.venv-te/bin:$CUDA_HOME/bin:$PATH
export CPLUS_INCLUDE_PATH=$includes${CPLUS_INCLUDE_PATH:-}
# Compiled here: upstream's setup.py would first ask a release page for a wheel, without a time limit.
export NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_FRAMEWORK=pytorch MAX_JOBS=${MAX_JOBS:-1}
export PIP_CACHE_DIR=$PWD/.venv-te/pip-cache PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
unset PYTHONPATH PYTHONHOME PIP_TARGET PIP_PREFIX PIP_USER

echo "set-up: building ${requirements[*]} into .venv-te with CUDA $release from $CUDA_HOME," \
    "MAX_JOBS=$MAX_JOBS; its output goes to .venv-te/setup.log"
pip=(.venv-te/bin/python -m pip install --progress-bar off)
(
    set -e
    [[ ! -L "$own/nvidia" ]] || rm "$own/nvidia"
    "${pip[@]}" "wheel>=0.45" "ninja>=1.11"
    "${pip[@]}" --verbose --no-build-isolation "${requirements[@]}"
    # It looks for cuDNN and curand in this folder of its own environment only.
    [[ -e "$own/nvidia" ]] || ln -s "$base/nvidia" "$own/nvidia"
    # torch first: it loads NCCL, which the library of Transformer Engine names without a path.
    .venv-te/bin/python -c 'import torch, transformer_engine.pytorch, transformer_engine
print("transformer-engine", transformer_engine.__version__)'
) >.venv-te/setup.log 2>&1 </dev/null 9>&- &
build=$!
trap 'kill "$build" 2>/dev/null || true' INT TERM
while kill -0 "$build" 2>/dev/null; do
    for _ in {1..30}; do kill -0 "$build" 2>/dev/null || break; sleep 1; done
    files=$(grep -o '\[[0-9]*/[0-9]*\] c++' .venv-te/setup.log | tail -n 1 || true)
    echo "set-up: $SECONDS s${files:+, file ${files% c++}}"
done
if ! wait "$build"; then
    tail -n 15 .venv-te/setup.log >&2
    fail "the lines above are the end of .venv-te/setup.log. Run the same make again once the cause" \
        "is gone: network, disk, a compiler, or memory (a file takes 2 to 4 GB; MAX_JOBS=$MAX_JOBS)"
fi
rm -rf .venv-te/pip-cache
echo "$key" >.venv-te/.setup-complete.partial
mv .venv-te/.setup-complete.partial .venv-te/.setup-complete
echo "set-up: $(tail -n 1 .venv-te/setup.log) in .venv-te after $SECONDS s"
