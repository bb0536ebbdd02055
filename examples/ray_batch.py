#!/usr/bin/env python3
"""Run `oncall batch` over a folder of JSONL shards with Ray Data: each task is one shard, the command is the worker.

A task that Ray starts again, on another machine too if the folders are shared, goes on where it was: --resume.
"""
import argparse
import json
import pathlib
import subprocess

import ray


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--oncall", default="oncall", help="the command")
    p.add_argument("--model", help="a GGUF file; without it the model that is built in")
    p.add_argument("--input", required=True, type=pathlib.Path, help="a folder of *.jsonl")
    p.add_argument("--output", required=True, type=pathlib.Path, help="a folder for the results, under the same names")
    p.add_argument("--memory", default="auto", help="for each task")
    p.add_argument("--cpus", type=int, default=2, help="for each task")
    a = p.parse_args()
    a.output.mkdir(parents=True, exist_ok=True)
    shards = sorted(str(s.absolute()) for s in a.input.glob("*.jsonl"))
    command = [a.oncall, "batch", "--resume", "--json", "--memory", a.memory, "-t", str(a.cpus)]
    output = a.output.absolute()
    if a.model:
        command += ["-m", str(pathlib.Path(a.model).absolute())]

    def run(row: dict) -> dict:
        shard = pathlib.Path(row["item"])
        done = subprocess.run(
            [*command, "-i", str(shard), "-o", str(output / shard.name)], capture_output=True, text=True, check=False
        )
        # The figures come when the job has got to its end. 1 then means that some results are errors; without them, or with some
        # requests left, it's the job that failed.
        figures = json.loads(done.stdout or "{}")
        if done.returncode not in (0, 1) or not figures or figures["done"] != figures["total"]:
            raise RuntimeError(f"{shard.name}: exit code {done.returncode}: {done.stderr.strip()}")
        return {"shard": shard.name, "done": figures["done"], "errors": figures["failed"]}

    results = ray.data.from_items(shards, override_num_blocks=max(1, len(shards))).map(run, num_cpus=a.cpus).take_all()
    for r in sorted(results, key=lambda r: r["shard"]):
        print(f"{r['shard']}: {r['done']} results, {r['errors']} of them errors")


if __name__ == "__main__":
    main()
