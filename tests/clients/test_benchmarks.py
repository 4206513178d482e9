"""Benchmarks that ask OpenAI-compatible servers."""

import base64
import io
import json
from pathlib import Path

import httpx
import lm_eval
import pytest
from conftest import MODEL
from lm_eval.tasks import TaskManager
from PIL import Image

TASK = """
task: colours
dataset_path: json
dataset_kwargs:
  data_files: {file}
test_split: train
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: ["\\n\\n"]
  max_gen_toks: 5
metric_list:
  - metric: exact_match
"""


def test_lm_eval_without_a_key(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"question": f"What colour is number {n}?", "answer": "red"} for n in range(3)]
    file.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "colours.yaml").write_text(TASK.format(file=file))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    result = lm_eval.simple_evaluate(
        model="local-chat-completions",
        model_args={"model": MODEL, "base_url": f"{base}/chat/completions", "max_retries": 1},
        tasks=["colours"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        apply_chat_template=True,
        bootstrap_iters=0,
    )
    assert result["n-samples"]["colours"]["effective"] == 3
    assert all(isinstance(each["resps"][0][0], str) for each in result["samples"]["colours"])


def test_a_request_of_vlmevalkit(base: str) -> None:
    """Its package is not in the registry: the fields are those of its OpenAIWrapper."""
    stream = io.BytesIO()
    Image.new("RGB", (96, 64), "red").save(stream, "JPEG")
    url = f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
    for detail in ("low", "high"):
        content = [
            {"type": "image_url", "image_url": {"url": url, "detail": detail}},
            {"type": "text", "text": "What colour is it?"},
        ]
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]
        body = {"model": MODEL, "messages": messages, "n": 1, "temperature": 0, "max_tokens": 20}
        headers = {"Content-Type": "application/json", "Authorization": "Bearer sk-none"}
        answer = httpx.post(f"{base}/chat/completions", headers=headers, content=json.dumps(body), timeout=60)
        assert answer.status_code == 200, answer.text
        assert isinstance(answer.json()["choices"][0]["message"]["content"], str)
