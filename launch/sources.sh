# Sourced: tell uv where pip is configured to find packages. Without local wheels in pip's configuration, the CPU build of
# torch comes from PyTorch's CPU index.
pip_setting() { "${PYTHON:-python3}" -m pip config get "global.$1" 2>/dev/null || true; }
links=${PIP_FIND_LINKS:-$(pip_setting find-links)}
index=${PIP_INDEX_URL:-$(pip_setting index-url)}
certificate=${PIP_CERT:-$(pip_setting cert)}
[ -z "$index" ] || export UV_DEFAULT_INDEX=$index
[ -z "$certificate" ] || export SSL_CERT_FILE=$certificate
if [ -n "$links" ]; then
  export UV_FIND_LINKS=${links// /,}
else
  export UV_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu UV_INDEX_STRATEGY=unsafe-best-match
fi
