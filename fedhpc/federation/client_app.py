"""The built-in app's client: trains and evaluates an image classifier on its partition.

An ordinary Flower ClientApp; its run config has one key, ``run-dir``.
"""

from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedhpc.federation.experiment import Experiment, open_experiment
from fedhpc.federation.mapped import record_of
from fedhpc.isolation.devices import device_of_this_child
from fedhpc.learning import metrics, training
from fedhpc.learning.split import Split

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the received model on this client's examples and return it."""
    experiment = open_experiment(str(context.run_config["run-dir"]))
    device = device_of_this_child()
    (arrays_key, arrays), *_ = message.content.array_records.items()
    model = experiment.model_with(arrays)
    examples = experiment.examples(int(context.node_config["partition-id"]))
    settings = experiment.config.training
    with experiment.determinism(device):
        measured = training.train(
            model,
            examples.images,
            examples.labels,
            mean=experiment.dataset.mean,
            std=experiment.dataset.std,
            epochs=1 if experiment.rehearses else settings.epochs,
            batch_size=settings.batch_size,
            optimizer=settings.optimizer.name,
            optimizer_params=settings.optimizer.params,
            device=device,
            proximal_mu=_proximal_mu(message),
        )
    content = RecordDict(
        {
            arrays_key: record_of(model.state_dict()),
            "metrics": MetricRecord(
                {"num-examples": len(examples.labels), "train_loss": measured["loss"]}
            ),
        }
    )
    return Message(content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the received model on the examples that this client does not train on."""
    experiment = open_experiment(str(context.run_config["run-dir"]))
    arrays, *_ = message.content.array_records.values()
    client_id = int(context.node_config["partition-id"])
    examples = experiment.examples(client_id, validation=True)
    measured = evaluate_arrays(experiment, arrays, examples)
    scalars = {key: measured[key] for key in ("loss", "accuracy", "precision", "recall", "f1")}
    record = MetricRecord({"num-examples": len(examples.labels), **scalars})
    return Message(RecordDict({"metrics": record}), reply_to=message)


def evaluate_arrays(
    experiment: Experiment, arrays: ArrayRecord, split: Split, workers: int = 1
) -> dict[str, Any]:
    """Return the metrics of a model on some examples."""
    device = device_of_this_child()
    dataset = experiment.dataset
    with experiment.determinism(device):
        return metrics.evaluate(
            experiment.model_with(arrays).to(device),
            split.images,
            split.labels,
            mean=dataset.mean,
            std=dataset.std,
            num_classes=len(dataset.classes),
            device=device,
            workers=workers,
        )


def _proximal_mu(message: Message) -> float:
    """Return FedProx's coefficient, if the strategy sent one."""
    record: ConfigRecord
    for record in message.content.config_records.values():
        if "proximal-mu" in record:
            return float(record["proximal-mu"])  # type: ignore[arg-type]
    return 0.0
