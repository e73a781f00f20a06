"""The evaluations of a replay service, over HTTP."""

from buffer.connection import ServiceClient, body_of
from buffer.evaluations import ClaimAnswer, Evaluation, EvaluationBoard, EvaluationClaim
from buffer.wire import JSON, encode, parse


class HttpEvaluations:
    """Evaluations of a replay service."""

    def __init__(self, client: ServiceClient) -> None:
        self._client = client

    def claim(self, claim: EvaluationClaim) -> ClaimAnswer:
        """See Evaluations."""
        response = self._client.request("POST", "/v1/evaluations/claims", body=encode(claim, JSON))
        return parse(ClaimAnswer, body_of(response))

    def record(self, evaluation: Evaluation) -> None:
        """See Evaluations."""
        self._client.request("PUT", f"/v1/evaluations/{evaluation.version}", body=encode(evaluation, JSON))

    def read(self) -> EvaluationBoard:
        """See Evaluations."""
        return parse(EvaluationBoard, body_of(self._client.request("GET", "/v1/evaluations")))
