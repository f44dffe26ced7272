"""The bodies of requests, and our things in OpenAI's form."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from safebasin.service.store import Event, File, Job, Model

Text = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")]  # no control characters
Auto = Literal["auto"]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class HyperparametersBody(Body):
    n_epochs: Auto | Annotated[int, Field(ge=1, le=1000)] | None = None
    batch_size: Auto | Annotated[int, Field(ge=1, le=100_000)] | None = None
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0, le=1000)] | None = None


class Supervised(Body):
    hyperparameters: HyperparametersBody | None = None


class Method(Body):
    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: Supervised | None = None
    dpo: dict[str, Any] | None = None
    reinforcement: dict[str, Any] | None = None


class CreateJob(Body):
    model: Annotated[Text, Field(max_length=64)]
    training_file: Annotated[Text, Field(max_length=64)]
    validation_file: Annotated[Text, Field(max_length=64)] | None = None
    suffix: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{0,64}$")] | None = None
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    metadata: (
        Annotated[
            dict[Annotated[Text, Field(max_length=64)], Annotated[Text, Field(max_length=512)]], Field(max_length=16)
        ]
        | None
    ) = None
    method: Method | None = None
    hyperparameters: HyperparametersBody | None = None
    integrations: Annotated[list[Any], Field(max_length=0)] | None = None  # none is offered


def file_object(file: File, days: float) -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.size,
        "created_at": int(file.created),
        "expires_at": int(file.created + 86400 * days),
        "filename": file.name,
        "purpose": file.purpose,
        "status": "processed",
    }


def job_object(job: Job) -> dict[str, Any]:
    """OpenAI's clients have no name for paused or in review: such a job is queued, and its events say more."""
    options = {
        name: job.settings["hyperparameters"].get(name, "auto")
        for name in ("n_epochs", "batch_size", "learning_rate_multiplier")
    }
    over = job.finished is not None
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": int(job.created),
        "finished_at": int(job.finished) if job.finished is not None else None,
        "model": job.model,
        "fine_tuned_model": job.fine_tuned_model,
        "organization_id": job.tenant,
        "status": "queued" if job.phase in ("paused", "review") else job.phase,
        "error": job.error,
        "hyperparameters": options,
        "method": {"type": "supervised", "supervised": {"hyperparameters": options}},
        "training_file": job.training_file,
        "validation_file": job.validation_file,
        "result_files": [job.result_file] if job.result_file else [],
        "seed": job.seed,
        "metadata": job.settings["metadata"],
        "trained_tokens": None,
        "estimated_finish": None,
        "integrations": [],
        "verdict": job.outcome if over else None,  # ours: what the events say, in one place
    }


def event_object(event: Event) -> dict[str, Any]:
    return {
        "id": f"ftevent-{event.job.removeprefix('ftjob-')}-{event.number}",
        "object": "fine_tuning.job.event",
        "created_at": int(event.created),
        "level": event.level,
        "message": event.message,
        "type": event.kind,
        "data": event.data or {},
    }


def model_object(name: str, created: float, owner: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": int(created), "owned_by": owner}


def model_row(model: Model) -> dict[str, Any]:
    return model_object(model.id, model.created, model.tenant)


def error_object(message: str, code: str, param: str | None, status: int) -> dict[str, Any]:
    """An error in OpenAI's form, in ASCII: what came with a request may be no text that an answer can hold."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    text = message.encode("ascii", "backslashreplace").decode() if not message.isascii() else message
    return {"error": {"message": text, "type": kind, "param": param, "code": code}}
