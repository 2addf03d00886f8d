"""`baton ask`: one question to a running service, its answer printed as it streams."""

import http.client
import json
import urllib.parse
from typing import Annotated

import typer

ANSWER_TIMEOUT_S = 120.0


def ask(
    question: Annotated[str, typer.Argument(help="what to ask")],
    url: Annotated[str, typer.Option(help="address of a router or a worker")] = "http://127.0.0.1:8000",
    max_tokens: Annotated[int, typer.Option(min=1, help="longest answer, in tokens")] = 256,
) -> None:
    """Ask the model behind URL one question (greedy) and print the answer as it comes."""
    address = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "127.0.0.1", address.port, timeout=ANSWER_TIMEOUT_S)
    try:
        connection.request("GET", "/v1/models")
        model = json.loads(connection.getresponse().read())["data"][0]["id"]
        messages = [{"role": "user", "content": question}]
        body = {"model": model, "messages": messages, "max_tokens": max_tokens, "temperature": 0, "stream": True}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise typer.BadParameter(
                f"{url} answered {response.status}: {response.read(2000).decode(errors='replace')}"
            )
        typer.echo(f"> {question}")
        for line in response:
            if line.startswith(b"data: {"):
                print_event(json.loads(line[len(b"data: ") :]))
        typer.echo("")
    except OSError as error:
        raise typer.BadParameter(f"{url}: {error}") from None
    finally:
        connection.close()


def print_event(event: dict[str, object]) -> None:
    """Print the text of one chat chunk; an error in the stream ends the command."""
    if "error" in event:
        raise typer.BadParameter(f"the stream ended with an error: {event['error']}")
    choices = event.get("choices")
    for choice in choices if isinstance(choices, list) else []:
        typer.echo(choice["delta"].get("content") or "", nl=False)
