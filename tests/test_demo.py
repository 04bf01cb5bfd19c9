"""Room 13: the demo upstream shows the main job without any network."""

import gzip
import json
import os
import unittest
from typing import Any, Dict, List, Tuple

from tests.support import PROGRAM, Answer, Proxy, RawClient, build_request, exchange, get, post

CONFIG_PATH = os.path.join(os.path.dirname(PROGRAM), "config.json")
TEXT = "a prompt that is long enough to count some tokens " * 20


def events_of(got: Answer) -> List[Tuple[str, Dict[str, Any]]]:
    """Return name and data of each event; every event must be `event:`, `data:` and an empty line, with LF."""
    blocks = got.body.decode("utf-8").split("\n\n")
    assert blocks.pop() == "", "the stream does not end with an empty line"
    events = []
    for block in blocks:
        if block == ": keepalive":
            continue
        name, data = block.split("\n")
        assert name.startswith("event: ") and data.startswith("data: "), block
        events.append((name[7:], json.loads(data[6:])))
    return events


class DemoTest(unittest.TestCase):
    """The shipped config.json, unedited."""

    proxy: Proxy
    model: str

    @classmethod
    def setUpClass(cls):
        with open(CONFIG_PATH, encoding="utf-8") as file:
            config = json.load(file)
        cls.proxy = Proxy(config)
        cls.proxy.__enter__()
        cls.addClassCleanup(cls.proxy.__exit__, None)
        cls.model = get(cls.proxy.port, "/v1/models", key=None).json()["data"][0]["id"]

    def ask(self, headers: Any = (), path: str = "/v1/responses", **body: Any) -> Answer:
        got = post(self.proxy.port, path, dict({"model": self.model, "input": TEXT}, **body), headers, key=None)
        self.assertEqual((got.status, got.complete), (200, True), got.body)
        return got

    def cached(self, headers: Any = (), **body: Any) -> int:
        return int(self.ask(headers, **body).json()["usage"]["input_tokens_details"]["cached_tokens"])

    def test_shipped_config_needs_no_network_no_key_and_no_variable(self):
        with open(CONFIG_PATH, encoding="utf-8") as file:
            text = file.read()
        self.assertIn("demo://", text)
        self.assertNotIn("${", text)
        self.assertNotIn("http", text)

    def test_stream_has_the_event_sequence_of_the_real_api(self):
        got = self.ask(stream=True)
        self.assertEqual((got.header("Content-Type") or "").split(";")[0], "text/event-stream")
        events = events_of(got)
        names = [name for name, _ in events]
        deltas = names.count("response.output_text.delta")
        self.assertGreater(deltas, 1)
        self.assertEqual(
            names,
            ["response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"]
            + ["response.output_text.delta"] * deltas
            + ["response.output_text.done", "response.content_part.done", "response.output_item.done"]
            + ["response.completed"],
        )
        self.assertEqual([data["type"] for _, data in events], names)
        self.assertEqual([data["sequence_number"] for _, data in events], list(range(len(events))))

    def test_parts_of_the_stream_agree_with_each_other(self):
        events = events_of(self.ask(stream=True))
        data = dict(events)  # the last of each name
        completed = data["response.completed"]["response"]
        item, part = completed["output"][0], completed["output"][0]["content"][0]
        joined = "".join(one["delta"] for name, one in events if name == "response.output_text.delta")
        self.assertEqual(joined, part["text"])
        self.assertEqual(data["response.output_text.done"]["text"], joined)
        self.assertEqual(data["response.content_part.done"]["part"], part)
        self.assertEqual(data["response.output_item.done"]["item"], item)
        self.assertEqual({one["item_id"] for _, one in events if "item_id" in one}, {item["id"]})
        self.assertEqual(data["response.created"]["response"]["id"], completed["id"])
        self.assertEqual(data["response.created"]["response"]["status"], "in_progress")
        self.assertEqual((completed["status"], completed["model"]), ("completed", self.model))
        self.assert_usage(completed["usage"])

    def assert_usage(self, usage: Dict[str, Any]) -> None:
        self.assertEqual(usage["total_tokens"], usage["input_tokens"] + usage["output_tokens"])
        self.assertTrue(0 <= usage["input_tokens_details"]["cached_tokens"] <= usage["input_tokens"])
        self.assertGreater(usage["output_tokens"], 0)

    def test_json_object_comes_without_stream(self):
        for got in (self.ask(), self.ask(stream=False)):
            self.assertEqual((got.header("Content-Type") or "").split(";")[0], "application/json")
            response = got.json()
            self.assertEqual((response["object"], response["status"]), ("response", "completed"))
            self.assertEqual(response["output"][0]["content"][0]["type"], "output_text")
            self.assert_usage(response["usage"])

    def test_answer_tells_what_it_saw_of_the_routing_headers(self):
        text = self.ask(prompt_cache_key="key-7").json()["output"][0]["content"][0]["text"]
        self.assertEqual(text.count("key-7"), 3, text)  # session_id, session-id, x-client-request-id
        text = self.ask({"session_id": "mine", "x-client-request-id": "other"}).json()["output"][0]["content"][0][
            "text"
        ]
        self.assertEqual((text.count("mine"), text.count("other")), (2, 1), text)

    def test_cached_tokens_rise_with_the_same_prompt_cache_key(self):
        for number in range(10):
            body = {"prompt_cache_key": f"conversation-{number}", "input": f"{number} {TEXT}"}
            self.assertEqual(self.cached(**body), 0)
            self.assertGreater(self.cached(**body), 100)

    def test_cached_tokens_rise_from_turn_to_turn_of_a_session(self):
        items = [{"role": "user", "content": TEXT}]
        seen = []
        for turn in range(4):
            usage = self.ask({"session-id": "turns"}, input=items).json()["usage"]
            seen.append(usage["input_tokens_details"]["cached_tokens"])
            self.assertLess(seen[-1], usage["input_tokens"])
            items = [*items, {"role": "assistant", "content": f"{turn} {TEXT}"}, {"role": "user", "content": "more"}]
        self.assertEqual(seen[0], 0)
        self.assertEqual(seen, sorted(set(seen)))

    def test_cached_tokens_stay_0_mostly_without_a_session(self):
        """40 conversations of two turns: a random one of the shards has seen the first turn 1 time in 16, say.

        Even if each had 1 chance in 4, more than half would hit less than once in 10,000 runs."""
        hits = 0
        for number in range(40):
            prompt = f"no session {number} {TEXT}"
            self.cached(input=prompt)
            hits += self.cached(input=prompt) > 0
        self.assertLess(hits, 20)

    def test_prefix_that_changed_is_not_cached(self):
        self.cached(prompt_cache_key="changing", input=[{"role": "user", "content": "one " + TEXT}])
        self.assertEqual(
            self.cached(prompt_cache_key="changing", input=[{"role": "user", "content": "two " + TEXT}], tools=[1]), 0
        )

    def test_other_routes_answer_too(self):
        tokens = self.ask(path="/v1/responses/input_tokens").json()
        self.assertGreater(tokens["input_tokens"], 100)
        self.assertIsInstance(self.ask(path="/v1/responses/compact").json(), dict)
        path = "/v1/responses/" + self.ask().json()["id"]
        for method, rest in (("GET", ""), ("DELETE", ""), ("POST", "/cancel")):
            self.assertEqual(exchange(self.proxy.port, build_request(method, path + rest, key=None)).status, 404)

    def test_compressed_bodies_are_read(self):
        """pi 0.87 and Codex, signed in, send no others."""
        body = gzip.compress(json.dumps({"model": self.model, "input": TEXT}).encode())
        got = post(self.proxy.port, "/v1/responses", body, {"Content-Encoding": "gzip"}, key=None)
        self.assertEqual(got.status, 200)
        got = post(self.proxy.port, "/v1/responses", body, {"Content-Encoding": "br"}, key=None)
        self.assertEqual(got.status, 415)

    def test_many_at_once_and_many_on_one_connection(self):
        clients = [RawClient(self.proxy.port) for _ in range(20)]
        for client in clients:
            self.addCleanup(client.close)
            client.send(build_request("POST", "/v1/responses", {"model": self.model, "stream": True}, key=None))
        for client in clients:
            self.assertEqual(events_of(client.read_answer())[-1][0], "response.completed")
        for _ in range(50):
            clients[0].send(build_request("POST", "/v1/responses", {"model": self.model}, key=None))
            self.assertEqual(clients[0].read_answer().status, 200)

    def test_client_that_leaves_ends_the_demo_stream(self):
        for _ in range(5):
            with RawClient(self.proxy.port) as client:
                client.send(build_request("POST", "/v1/responses", {"model": self.model, "stream": True}, key=None))
                client.wait_for(b"response.created")
        self.proxy.wait_for_record(lambda one: one["error"] == "client_gone")
        self.assertEqual(self.ask().status, 200)

    def test_odd_bodies_are_answered_and_leave_it_running(self):
        bodies: List[Dict[str, Any]] = [{"input": None}, {"input": 1}, {"input": []}, {"input": [None, 1, "x"]}]
        bodies += [{"instructions": {}}, {"input": "\ud800"}, {"stream": "yes"}, {"prompt_cache_key": 7}]
        for body in bodies:
            with self.subTest(body):
                got = post(self.proxy.port, "/v1/responses", dict({"model": self.model}, **body), key=None)
                self.assertIn(got.status, (200, 400))
        self.assertEqual(self.ask().status, 200)


if __name__ == "__main__":
    unittest.main()
