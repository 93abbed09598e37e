"""Signing up, in and out in a browser, and what no other site can make the browser do."""

from collections.abc import AsyncIterator

import pytest

from tests.house import PASSWORD, House
from tests.visiting import EMAIL, Visitor, browser
from tests.visiting import house as house


@pytest.fixture
async def visitor(house: House) -> AsyncIterator[Visitor]:
    """A browser nobody is signed in with; Ann has an account."""
    await house.sign_up(EMAIL)
    async with browser(house) as opened:
        yield opened


async def test_a_person_signs_up_looks_around_and_signs_out(house: House) -> None:
    async with browser(house) as visitor:
        assert 'href="/signup"' in (await visitor.get("/")).text
        assert 'action="/signup"' in (await visitor.get("/signup")).text
        joined = await visitor.post("/signup", email=EMAIL, password=PASSWORD, display_name="Ann <b>")
        assert (joined.status, joined.location) == (303, "/devices")
        home = await visitor.get("/")
        assert "Hello, Ann &lt;b&gt;" in home.text
        assert "Welcome to Cloudphone" in home.text
        for form in ("/login", "/signup"):
            assert (await visitor.get(form)).location == "/devices"
        account = await visitor.get("/account")
        assert EMAIL in account.text
        assert "This one" in account.text
        left = await visitor.post("/logout", csrf_token=home.csrf_token)
        assert (left.status, left.location) == (303, "/")
        assert (await visitor.get("/account")).location == "/login?next=/account"


async def test_a_form_that_does_not_fit_says_so_where_it_does_not(visitor: Visitor) -> None:
    wrong = await visitor.post("/signup", email="nonsense", password="short", display_name="Ann")
    assert wrong.status == 422
    assert "This is not an e-mail address." in wrong.text
    assert "At least 10 characters, please." in wrong.text
    assert 'value="Ann"' in wrong.text
    assert "short" not in wrong.text.replace("shortly", "")
    taken = await visitor.post("/signup", email=EMAIL, password=PASSWORD, display_name="")
    assert taken.status == 409
    refused = await visitor.post("/login", email=EMAIL, password="a wrong password", next="/apps")
    assert refused.status == 401
    assert "E-mail or password is wrong" in refused.text
    assert 'name="next" value="/apps"' in refused.text


async def test_signing_in_goes_on_to_a_page_of_this_site_only(house: House, visitor: Visitor) -> None:
    for wanted in ("/apps?x=1", "//evil.example", "https://evil.example", "/\\evil.example", ""):
        local = wanted if wanted == "/apps?x=1" else ""
        async with browser(house) as other:
            shown = await other.get(f"/login?next={wanted}")
            assert f'name="next" value="{local}"' in shown.text
            entered = await other.post("/login", email=EMAIL, password=PASSWORD, next=wanted)
            assert (entered.status, entered.location) == (303, local or "/devices")


async def test_signing_in_again_ends_the_session_before(house: House, visitor: Visitor) -> None:
    await visitor.log_in()
    first = {cookie.key: cookie.value for cookie in visitor.http.cookie_jar}
    token = (await visitor.get("/account")).csrf_token
    await visitor.post("/login", email=EMAIL, password=PASSWORD, csrf_token=token)
    assert (await visitor.get("/account")).status == 200
    async with house.http.get(f"{house.url}/api/v1/users/me", cookies=first) as reply:
        assert reply.status == 401


async def test_a_cookie_changes_nothing_without_the_pages_token(house: House, visitor: Visitor) -> None:
    await visitor.log_in()
    token = (await visitor.get("/account")).csrf_token

    async def rename(**headers: str) -> int:
        url = f"{house.url}/api/v1/users/me"
        async with visitor.http.patch(url, json={"display_name": "x"}, headers=headers) as reply:
            return reply.status

    assert await rename() == 403
    assert await rename(**{"X-CSRF-Token": "guessed"}) == 403
    assert await rename(**{"X-CSRF-Token": token, "Origin": "https://evil.example"}) == 403
    assert await rename(**{"X-CSRF-Token": token, "Origin": "null"}) == 403
    assert await rename(**{"X-CSRF-Token": token, "Origin": house.url}) == 200
    assert (await visitor.post("/logout")).status == 403
    assert (await visitor.post("/logout", origin="https://evil.example", csrf_token=token)).status == 403
    assert (await visitor.get("/account")).status == 200


async def test_another_site_cannot_sign_a_browser_in(visitor: Visitor) -> None:
    tricked = await visitor.post("/login", origin="https://evil.example", email=EMAIL, password=PASSWORD)
    assert tricked.status == 403
    assert (await visitor.get("/account")).status == 303


async def test_a_cookie_and_a_token_of_two_people_are_refused(house: House, visitor: Visitor) -> None:
    await visitor.log_in()
    bob = await house.sign_up()
    async with visitor.http.get(f"{house.url}/api/v1/users/me", headers=bob.headers) as reply:
        assert (reply.status, (await reply.json())["code"]) == (400, "ambiguous_credentials")
