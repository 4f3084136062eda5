import sys, json, time
sys.path.insert(0,"tests")
from pathlib import Path
from tempfile import mkdtemp
from support.engine_runs import Job, write
from support.forked import forked
from support.launchers import ROOT
t=time.time()
tmp=Path(mkdtemp())
small=dict(img_size=8,patch_size=4,embed_dim=64,depth=4,num_heads=2)
jobs=[]
for stage in range(4):
  for acc in (1,2):
    for rec in (False,True):
      z={} if stage<3 else dict(stage3_param_persistence_threshold=1000)
      jobs.append(Job(output=str(tmp/f"{stage}{acc}{rec}"),stage=stage,accumulation=acc,recompute=rec,args=small,precision="bf16" if stage==2 else "fp32",zero=z))
for rec in (False,True):
  for reuse,pre in ((0,0),(0,50_000_000),(120_000,0),(120_000,50_000_000)):
    jobs.append(Job(output=str(tmp/f"3r{rec}{reuse}{pre}"),stage=3,recompute=rec,args=small,zero=dict(stage3_param_persistence_threshold=1000,stage3_max_reuse_distance=reuse,stage3_prefetch_bucket_size=pre)))
done=forked(ROOT/"tests/support/counted_collectives.py",write(tmp/"jobs.json",jobs))
print(done.returncode, done.stdout[-3000:] if done.returncode else "")
print(time.time()-t)
for j in jobs:
  d=json.loads((Path(j.output)/"collectives.json").read_text())
  P=d["parameters"]; sm=sum(s for s in d["sizes"] if s<=1000)
  size=2 if j.precision=="bf16" else 4
  print(Path(j.output).name, P, sm, {k:round(v/size/P,4) for k,v in d["bytes"].items()}, "large", (P-sm)/P)
