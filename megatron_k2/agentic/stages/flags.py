"""Flags of ``tools/synthesize_agentic.py``."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

STAGE_NAMES = ("tools", "agents", "tasks", "trajectories", "judge", "output", "report")
DESCRIPTION = """Agentic training data as Kimi K2's (arXiv 2507.20534, 3.1.1): tools from MCP dumps,
live MCP servers and evolution; agents; tasks with rubrics; dialogues of a simulated user, a policy
and a tool simulator or real servers; a judge that keeps what meets its rubric; rows for
fine-tuning, tasks for RL, a report. Run again after any stop, it goes on."""
EXAMPLES = """
stages (a folder each in OUT):
  tools -> agents -> tasks -> trajectories -> judge -> output -> report

examples:
  # the whole pipeline without a server: a script answers (plumbing, not quality)
  tools/synthesize_agentic.py run --model scripted --out out/try --tasks 50 \\
    --dump toucan-mcp-servers.tar.gz
  # what a run of 20,000 evolved tools would ask and cost, before it asks anything
  tools/synthesize_agentic.py run --dry-run --out out/big --dump servers.tar.gz \\
    --evolved-tools 20000 --tasks 50000 --attempts 2 --price-per-million 0.6 2.5
  # a server, with judges of other models, a budget, and the key from the environment
  OPENAI_API_KEY=... tools/synthesize_agentic.py run --out out/big --dump servers.tar.gz \\
    --model https://api.example.com/v1,kimi-k2 --key-env OPENAI_API_KEY \\
    --model-for judge=http://localhost:8000/v1,judge-a \\
    --model-for judge=https://other.example.com/v1,judge-b --key-env judge=OTHER_API_KEY \\
    --max-tokens 50000000
  # the agent played by a model that was trained here, by K2's template and token ledger
  tools/synthesize_agentic.py run ... --model scripted --model-for policy=engine:out/sft/checkpoints
  # the tools only; later the rest
  tools/synthesize_agentic.py run --stages tools --evolved-tools 20000 ...
  # other tasks from the same agents: what follows them is redone, the tools and agents are kept
  tools/synthesize_agentic.py run ... --tasks 1000 --restart-from tasks
  # recorded answers, nothing is asked: the same bytes with the flags of the recorded run, without
  # its --model, --model-for and --judge-passes
  tools/synthesize_agentic.py run ... --replay out/big/answers
  # real MCP servers in the sandbox beside the simulation
  tools/synthesize_agentic.py run ... --real-servers --mcp servers.toml
  # tools of MCP servers over HTTP, under a name of one's own
  tools/synthesize_agentic.py run ... --mcp-url http://localhost:9000/mcp --mcp-url crm=https://...
  # on a Ray cluster whose nodes share the folders: the same files
  tools/synthesize_agentic.py run ... --ray --ray-workers 16 --concurrency 1024
  # how far it is, whether its files are whole, what a trajectory says
  tools/synthesize_agentic.py status out/big
  tools/synthesize_agentic.py verify out/big
  tools/synthesize_agentic.py show out/big trajectories --number 3
  tools/synthesize_agentic.py show out/big judgements --number 3
"""


LEAST_AGENTS, TASKS_AN_AGENT = 100, 20


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    raw = argparse.RawDescriptionHelpFormatter
    found = argparse.ArgumentParser(
        prog="synthesize_agentic.py", description=DESCRIPTION, epilog=EXAMPLES,
        formatter_class=raw, allow_abbrev=False,
    )  # fmt: skip
    commands = found.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser(
        "run", help="run stages, or go on", description=DESCRIPTION, epilog=EXAMPLES,
        formatter_class=raw, allow_abbrev=False,
    )  # fmt: skip
    _add_run(run.add_argument_group("run"))
    _add_tools(run.add_argument_group("tools"))
    _add_sizes(run.add_argument_group("agents, tasks, trajectories"))
    _add_model(run.add_argument_group("model"))
    _add_limits(run.add_argument_group("requests and limits"))
    for name, words in (
        ("status", "how far a run is, and what it spent"),
        ("verify", "whether files are whole and records fit together"),
    ):
        one = commands.add_parser(name, help=words, description=words, allow_abbrev=False)
        one.add_argument("out", type=Path, metavar="OUT", help="folder of a run")
    _add_show(commands.add_parser("show", help="print a record to read", allow_abbrev=False))
    return found


def _add_run(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the run")
    add(
        "--stages", nargs="+", choices=STAGE_NAMES, default=list(STAGE_NAMES), metavar="STAGE",
        help=f"to run; default all: {' '.join(STAGE_NAMES)}",
    )  # fmt: skip
    add(
        "--restart-from", choices=STAGE_NAMES, metavar="STAGE",
        help="redo this stage and those after it where settings, inputs or files are not what they "
        "were made with; what is as it would be made now is kept, so the same command goes on "
        "after a kill",
    )  # fmt: skip
    add("--dry-run", action="store_true", help="print what would be asked and cost, and leave")
    add("--seed", type=int, default=0, help="of everything; default 0")
    add("--quiet", action="store_true", help="no progress bars")


def _add_tools(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--dump", type=Path, metavar="PATH", help="MCP descriptions: .tar.gz, folder or JSON")
    add("--max-dump-tools", type=int, metavar="N", help="of the dump, the first N; default all")
    add("--scraped-tools", choices=("mark", "drop", "use"), default="mark", help="of a dump, whose "
        "parameters a crawler took from prose: mark keeps them in the repository and out of "
        "agents, drop counts them alone, use treats them as others; default mark")  # fmt: skip
    add("--evolved-tools", type=int, default=2000, metavar="N", help="to grow; default 2000")
    add(
        "--real-servers", action="store_true",
        help="harvest tools of real MCP servers, and play their tasks in the sandbox; they come on "
        "top of --tasks",
    )  # fmt: skip
    add(
        "--mcp-url", action="append", default=[], metavar="[NAME=]URL",
        help="harvest tools of an MCP server by streamable HTTP too; may be given several times. "
        "Its calls are simulated, like those of a dump's servers",
    )  # fmt: skip
    add("--mcp", type=Path, metavar="FILE", help="own list of servers (TOML) for --real-servers")
    add(
        "--mcp-folder", type=Path, metavar="DIR",
        help="where tools/install_mcp_servers.py put them; default: installed packages alone",
    )  # fmt: skip


def _add_sizes(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--agents", type=int, metavar="N",
        help="over all domains; default: one for 20 tasks, 100 at least",
    )  # fmt: skip
    add("--server-share", type=float, default=0.25, metavar="SHARE", help="of agents with tools of "
        "a dump's servers, simulated by what their names say; default 0.25")  # fmt: skip
    add(
        "--model-simulates", action="store_true",
        help="give agents also those tools of servers that no operation could be inferred for: the "
        "model of the role simulator answers them",
    )  # fmt: skip
    add("--tasks", type=int, default=500, metavar="N", help="to try for, over all agents; "
        "default 500; one that is not proven is dropped")  # fmt: skip
    add("--attempts", type=int, default=1, metavar="N", help="trajectories a task; default 1")
    add(
        "--tools-per-agent", type=int, nargs=2, default=[3, 8], metavar=("LEAST", "MOST"),
        help="default 3 8",
    )  # fmt: skip
    add("--fault-share", type=float, default=0.4, metavar="SHARE", help="of tasks whose simulator "
        "fails at times; default 0.4")  # fmt: skip
    add("--max-turns", type=int, default=30, metavar="N", help="of the policy; default 30")
    add("--temperature", type=float, default=1.0, help="of the policy; default 1")
    add("--scripted-mistakes", type=float, default=0.25, metavar="SHARE", help="of trajectories in "
        "which a scripted policy errs; default 0.25, with a server 0")  # fmt: skip
    add("--judging", choices=("rules", "judge", "hybrid"), default="hybrid",
        help="default hybrid")  # fmt: skip
    add("--judge-passes", type=int, default=2, metavar="N", help="judges at least, so that their "
        "agreement is measured: where fewer models judge, one is asked again with another seed; "
        "default 2; several must agree")  # fmt: skip
    add("--heldout-share", type=float, default=0.2, metavar="SHARE", help="of tasks that are for "
        "evaluation; default 0.2")  # fmt: skip
    add("--heldout-by", choices=("world", "domain"), default="world", help="what the two sides "
        "never share; default world")  # fmt: skip


def _add_model(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--model", metavar="MODEL", help="scripted, or URL,NAME of an OpenAI-compatible server; "
        "none with --replay: only recorded answers")  # fmt: skip
    add(
        "--model-for", action="append", default=[], metavar="ROLE=MODEL",
        help="another one for evolve, agent, task, user, policy, simulator or judge; judge may be "
        "given several times. policy=engine:PATH plays a folder of Megatron's checkpoints, or of "
        "Hugging Face's, in this process, by token ids",
    )  # fmt: skip
    add(
        "--engine-tokenizer", type=Path, metavar="DIR",
        help="of policy=engine:PATH; default: the folder's own; it must have Kimi's chat format",
    )  # fmt: skip
    add(
        "--key-env", action="append", default=[], metavar="[ROLE=]NAME",
        help="environment variable that holds the key of --model's server, or of a role's; a key "
        "is never sent to another address",
    )  # fmt: skip
    add("--extra-body", default="{}", metavar="JSON", help="more fields of each request")
    add(
        "--record", action=argparse.BooleanOptionalAction, default=None,
        help="keep each answer in OUT/answers; default: with a server",
    )  # fmt: skip
    add("--replay", nargs="+", type=Path, default=[], metavar="PATH", help="recordings to answer "
        "from first: files, or folders of them")  # fmt: skip


def _add_limits(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--concurrency", type=int, default=16, metavar="N", help="requests at a time; default 16")
    add("--max-requests", type=int, metavar="N", help="of all starts of this run together")
    add("--max-tokens", type=int, metavar="N", help="of prompts and answers, all starts together")
    add("--price-per-million", type=float, nargs="+", default=[], metavar="PRICE",
        help="tokens, to show what it costs: one price, or prompts' and answers'")  # fmt: skip
    add("--timeout-s", type=float, default=300.0, metavar="S", help="of a request; default 300")
    add("--max-tries", type=int, default=8, metavar="N", help="of a request; default 8")
    add("--ray", action="store_true", help="spread the work over a Ray cluster")
    add("--ray-address", default="", metavar="ADDRESS", help="of it; default: start one here")
    add("--ray-workers", type=int, default=2, metavar="N", help="processes; default 2")


def _add_show(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    parser.description = (
        "print a record; a trajectory as text with its task and judgement, a judgement with the "
        "criteria, their scores and what was quoted as evidence"
    )
    add("out", type=Path, metavar="OUT", help="folder of a run")
    add(
        "kind", metavar="KIND",
        choices=("tools", "domains", "agents", "tasks", "trajectories", "judgements"),
        help="tools, domains, agents, tasks, trajectories or judgements",
    )  # fmt: skip
    add("--number", type=int, metavar="N", help="in its file, from 0; default 0")
    add("--id", default="", metavar="ID", help="or the first characters of it")
    add("--json", action="store_true", help="as it is in the file")


def check_flags(args: argparse.Namespace) -> None:
    """Check the flags of ``run``; say how many agents there are where nobody did.

    Raises:
        ValueError: one cannot be; names it.
    """
    for name, least in (
        ("evolved_tools", 0), ("agents", 1), ("tasks", 1), ("attempts", 1), ("concurrency", 1),
        ("max_tries", 1), ("ray_workers", 1), ("max_turns", 1), ("max_dump_tools", 0),
        ("judge_passes", 1),
        ("max_requests", 0), ("max_tokens", 0),
    ):  # fmt: skip
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} {value}: at least {least}")
    if args.agents is None:
        args.agents = max(LEAST_AGENTS, math.ceil(args.tasks / TASKS_AN_AGENT))
    for name in ("fault_share", "scripted_mistakes", "heldout_share", "server_share"):
        if not 0 <= getattr(args, name) <= 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: from 0 to 1")
    if not 0 <= args.temperature < math.inf:
        raise ValueError(f"--temperature {args.temperature}: 0 or more, and finite")
    if not 0 < args.timeout_s < math.inf:
        raise ValueError(f"--timeout-s {args.timeout_s}: above 0, and finite")
    if not all(0 <= price < math.inf for price in args.price_per_million):
        raise ValueError(f"--price-per-million {args.price_per_million}: 0 or more, and finite")
    if not 1 <= args.tools_per_agent[0] <= args.tools_per_agent[1]:
        raise ValueError(f"--tools-per-agent {args.tools_per_agent}: 1 <= LEAST <= MOST")
    if len(args.price_per_million) > 2:
        raise ValueError("--price-per-million: one price, or two: of prompts and of answers")
    if args.restart_from and args.restart_from not in args.stages:
        raise ValueError(f"--restart-from {args.restart_from}: is none of --stages")
    if not args.dry_run and args.model is None and not args.replay:
        raise ValueError("--model: wanted scripted or URL,NAME, or recorded answers with --replay")
    engines = [one for one in args.model_for if one.startswith("policy=engine:")]
    if args.model is None and len(engines) < len(args.model_for):
        raise ValueError("--model-for: needs --model, which answers the other roles")
    if args.ray and engines:
        raise ValueError(f"--ray: {engines[0]} plays in one process; serve it: megatron-k2 serve")
    if args.engine_tokenizer and not engines:
        raise ValueError("--engine-tokenizer: give --model-for policy=engine:PATH too")
    if (args.mcp or args.mcp_folder) and not args.real_servers:
        raise ValueError("--mcp and --mcp-folder: give --real-servers too")
    given = (args.dump, args.evolved_tools, args.real_servers, args.mcp_url)
    if "tools" in args.stages and not any(given):
        raise ValueError(
            "--dump, --evolved-tools, --real-servers or --mcp-url: one must give tools"
        )
    _check_extra_body(args.extra_body)


def _check_extra_body(text: str) -> None:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--extra-body {text}: is no JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"--extra-body {text}: is no JSON object")
