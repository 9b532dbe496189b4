#!/usr/bin/env bash
# Installs the MCP servers of PyPI and npm that agentic tasks use, for `make test-mcp`, into
# out/mcp-servers, at locked versions. Needs node 18 or newer, npm and git; about 130 MB.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { printf 'error: %s\n' "$@" >&2; exit 1; }

[[ -x .venv/bin/python ]] || fail ".venv is missing; run make setup first"
for program in node npm git; do
    command -v "$program" >/dev/null || fail "$program is missing; install it first"
done
exec .venv/bin/python tools/install_mcp_servers.py --folder out/mcp-servers
