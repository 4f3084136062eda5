"""Engines one after another in this process, each trained for a step; what they log or refuse is printed.

usage: python tests/support/one_engine.py JOBS.json   (a list of {"settings": a JSON, "run": fields of RunConfig})
"""

import json
import logging
import sys
from dataclasses import replace
from pathlib import Path

from support.engine_runs import Job, batch


def train_one_step(settings: dict, fields: dict) -> None:
    from vir.engine.engine import Engine
    from vir.errors import SettingsError

    job = Job(output=fields["output"])
    try:
        engine = Engine(job.build(), replace(job.config(), **fields), settings, accumulation=1)
    except SettingsError as error:
        return print(f"refused: {error}", flush=True)
    engine.backward(engine(batch(0)[0]).float().square().mean())
    engine.step(1e-2, 0.0)
    inductor = "with" if "torch._inductor.compile_fx" in sys.modules else "without"
    print(f"trained {inductor} inductor", flush=True)
    engine.close()


if __name__ == "__main__":
    from vir import distributed

    logging.basicConfig(level=logging.INFO, format="%(name)s %(levelname)s: %(message)s", stream=sys.stdout)
    distributed.start()
    for each in json.loads(Path(sys.argv[-1]).read_text()):
        print(f"== {each['run']['output']}", flush=True)
        train_one_step(each["settings"], {"deepspeed_config": "mine.json"} | each["run"])
    distributed.stop()
