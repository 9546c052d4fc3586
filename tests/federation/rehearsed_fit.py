"""One fit of a prepared run folder, with or without a rehearsal before it; prints what it was."""

import json
import sys

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from fedhpc.federation import compat, fit, grid_pb2
from fedhpc.federation.experiment import open_experiment
from fedhpc.federation.payload import Encodings, pack

run_dir, times = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
fit.prepare(run_dir)
experiment = open_experiment(run_dir)
torch.manual_seed(1)
arrays = ArrayRecord(experiment.new_model().state_dict())
before = torch.random.get_rng_state()
for _ in range(times):
    fit.rehearse(run_dir)
same_state = torch.equal(before, torch.random.get_rng_state())
content = RecordDict({"arrays": arrays, "config": ConfigRecord()})
message = Message(content, dst_node_id=3, message_type="train")
compat.set_message_id(message, "1-2-train-0")
packed = pack(message, None, Encodings())
packed.payload.client_id, packed.payload.seed, packed.payload.inline_bytes = 2, 7, 1 << 30
work = grid_pb2.Work(message_id="1-2-train-0", payload=packed.payload.SerializeToString())
work.blobs.extend(grid_pb2.Blob(digest=blob.digest, size=blob.size) for blob in packed.blobs)
blobs = [memoryview(b"".join(blob.parts)) for blob in packed.blobs]
((answer,), *_) = fit.run(memoryview(work.SerializeToString()), *blobs)
result = grid_pb2.Result.FromString(bytes(answer))
said = {
    "same random state": same_state,
    "examples": len(experiment.examples(2).labels),
    "model": [blob.digest for blob in result.blobs],
}
print(json.dumps(said))
