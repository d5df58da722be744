URL = "https://93.184.216.34/hook"


def test_a_webhook_is_made_shown_and_removed(client):
    made = client.post("/v1/webhooks", json={"url": URL})
    assert made.status_code == 201
    webhook = made.json()
    secret = webhook.pop("secret")
    assert secret.startswith("whsec_")
    assert client.get(made.headers["location"]).json() == webhook
    assert client.get("/v1/webhooks").json()["data"] == [webhook]
    assert client.delete(made.headers["location"]).status_code == 204
    assert client.get(made.headers["location"]).json()["code"] == "webhook_not_found"


def test_a_webhook_leads_to_a_public_host(client):
    for url, code in (("http://93.184.216.34/", "invalid_value"), ("https://[::1]/", "invalid_webhook_url")):
        refused = client.post("/v1/webhooks", json={"url": url})
        assert (refused.status_code, refused.json()["code"]) == (422, code)
        assert refused.json()["errors"][0]["pointer"] == "/url"


def test_webhooks_have_an_end(client):
    answers = [client.post("/v1/webhooks", json={"url": URL}).status_code for _ in range(21)]
    assert answers == [201] * 20 + [422]
