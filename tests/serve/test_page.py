"""The chat page in a real browser: typed, streamed, stopped, reloaded, clicked."""
from __future__ import annotations

import json
import os
import re
import shutil

import pytest

from fira.serve.server import PAGE, page_headers

CHROMIUM = next(filter(None, map(shutil.which, (
    "chromium", "chromium-browser", "google-chrome"))), None)
SAID = "Größe 🙂 of the Union. "
MARKDOWN = """# Title
One **bold *both*** `*` `a*` [link](https://a.org/b_(c)) [bad](javascript:alert(1)) \\*x\\* a_b_c
1. first
   - <img src=x onerror=document.title='run'> **item**

> quoted
| a | b |
|---|---|
| 1 | **2** |
~~~py
    y = "<b>**raw**</b>"
~~~
---"""
SHOWN = {"h3": 1, "strong": 3, "em": 1, "code": 3, "pre code": 1, "a": 1, "ol > li": 1, "hr": 1,
         "ul > li": 1, "blockquote p": 1, "th": 2, "td strong": 1, "b": 0, "img": 0, "script": 0}


def test_the_page_names_no_other_place():
    page = PAGE.read_text(encoding="utf-8")
    assert not re.search(r"https?://|//cdn|@import|\bsrc=|innerHTML|outerHTML|insertAdjacent"
                         r"|document\.write|\beval\(| on\w+=\"| style=\"", page)
    policy = page_headers(page)["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert policy.count("sha256-") == 2


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM:
        pytest.skip("no Chromium found on the PATH")
    with playwright.sync_playwright() as started:
        sandbox = [] if os.getuid() else ["--no-sandbox"]  # root cannot have one
        found = started.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        yield found
        found.close()


@pytest.fixture
def page(browser, running):
    """A page on the server; its console must stay without errors."""
    context = browser.new_context(viewport={"width": 1300, "height": 800})
    page, faults = context.new_page(), []
    page.set_default_timeout(10_000)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda line: line.type == "error" and "Failed to load" not in line.text
            and faults.append(line.text))
    opened(page, running.address)
    yield page
    context.close()
    assert faults == []


def opened(page, address):
    page.goto(address)
    page.wait_for_selector("#suggestions button")
    return page


def ask(page, words):
    page.fill("#message", words)
    page.keyboard.press("Enter")


def reply_to(page, words):
    ask(page, words)
    return finished(page)


def finished(page):
    page.wait_for_selector(".turn:last-child >> text=Regenerate")
    return page.locator(".reply").last.inner_text()


def settings(page, **values):
    page.click("#settings-open")
    for name, value in values.items():
        page.fill(f"[name={name}]", value)
    page.click("#settings >> text=Save")


def test_an_answer_streams_with_all_settings_and_survives_a_reload(page, engine, served):
    served.window = 100  # below the default of max_tokens, which must not block saving
    opened(page, page.url)
    values = {"temperature": 0.5, "seed": 7, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2,
              "presence_penalty": 0.3, "frequency_penalty": -0.4}
    settings(page, system="Be brief.", stop="never\\nthere\nUnion", **{
        name: str(value) for name, value in values.items()})
    assert reply_to(page, "Hello") == SAID.partition("Union")[0]
    params = engine.asked[-1][1]
    assert params.stop == ("never\nthere", "Union")
    assert {name: getattr(params, name) for name in values} == values
    assert page.locator("#live").inner_text().startswith("Reply: Größe 🙂")
    page.reload()
    page.wait_for_selector("text=Regenerate")
    assert page.locator(".reply").inner_text() == SAID.partition("Union")[0]
    assert titles(page) == ["Hello"]


def test_settings_are_saved_at_once_by_enter_too_and_not_when_they_are_left(page, engine):
    settings(page, max_tokens="5")
    page.click("#settings-open")
    page.fill("[name=max_tokens]", "6")
    page.keyboard.press("Escape")  # after one that was saved
    page.click("#settings-open")
    assert page.input_value("[name=max_tokens]") == "5"
    page.fill("[name=max_tokens]", "7")
    page.click("#settings >> text=Cancel")
    reply_to(page, "Hello")
    page.click("#settings-open")
    page.fill("[name=max_tokens]", "8")
    page.keyboard.press("Enter")
    reply_to(page, "Again")
    assert [params.max_new_tokens for _, params in engine.asked] == [5, 8]


def test_a_reply_goes_on_while_another_conversation_is_open_and_stop_frees_its_slot(page, engine):
    settings(page, max_tokens="30")
    begin(page, engine, "First")
    page.click("#new")
    begin(page, engine, "Second")
    page.click("#stop")
    assert SAID.startswith(finished(page)[:5])
    page.click("#conversations >> text=First")
    assert len(finished(page)) > len(SAID)
    page.wait_for_timeout(200)
    assert engine.running == {}


def begin(page, engine, words="Hello"):
    """Send a message whose reply grows slowly."""
    engine.pause = 0.05
    ask(page, words)
    page.wait_for_selector(".reply span:nth-child(3)")


def titles(page):
    return page.locator("#conversations li > :first-child").all_inner_texts()


def test_a_reload_keeps_the_question_and_the_growing_reply_which_can_be_continued(
        page, engine, tokenizer):
    begin(page, engine)
    page.reload()
    assert "The reply is cut" in page.locator(".fault").inner_text()
    cut = page.locator(".reply").inner_text()
    assert page.locator(".user .text").inner_text() == "Hello" and cut and SAID.startswith(cut)
    engine.pause = 0
    page.click("text=Continue")
    assert finished(page).startswith(cut + "Größe")  # the fake engine begins anew
    assert tokenizer.decode(engine.asked[-1][0]).endswith(f"assistant\n{cut}")


def test_two_tabs_keep_each_others_conversations_and_a_deleted_one_is_gone_from_both(page):
    other = opened(page.context.new_page(), page.url)
    reply_to(page, "From one")
    reply_to(other, "From two")
    page.bring_to_front()
    assert titles(page) == titles(other) == ["From two", "From one"]
    page.on("dialog", lambda dialog: dialog.accept())
    page.hover("text=From one")
    page.click("[aria-label='Delete From one']")
    other.wait_for_selector("#conversations >> text=From one", state="detached")
    other.reload()
    assert titles(other) == ["From two"]


def test_a_cut_stream_is_told_and_thoughts_are_folded_and_not_sent_back(page, engine, tokenizer):
    deltas = {"reasoning_content": "Well"}, {"reasoning_content": " then."}, {"content": "Yes."}
    chunks = [{"choices": [{"delta": delta, "finish_reason": None}]} for delta in deltas]
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body))
    ask(page, "Hello")
    page.wait_for_selector("text=Continue")
    assert page.locator(".fault").inner_text().startswith("The reply is cut. The connection was")
    assert not page.locator(".thoughts p").is_visible()
    page.click("text=Thoughts")
    assert page.locator(".thoughts p").inner_text() == "Well then."
    page.unroute("**/v1/chat/completions")
    reply_to(page, "And?")
    read = tokenizer.decode(engine.asked[-1][0])
    assert "Yes." in read and "Well" not in read


def test_a_model_that_thinks_is_asked_with_limits_and_its_thought_is_folded(page, engine, served):
    page.click("#settings-open")
    assert not page.locator("[name=reasoning_effort]").is_visible()
    page.click("#settings >> text=Cancel")
    served.thinks, engine.thought, engine.pause = True, ["Well", " then."], 0.1
    opened(page, page.url)
    page.click("#settings-open")
    page.select_option("[name=reasoning_effort]", "low")
    page.fill("[name=max_tokens]", "16")
    page.click("#settings >> text=Save")
    ask(page, "Hello")
    page.wait_for_selector(".thoughts summary")
    assert not page.locator(".thoughts p").is_visible()
    assert finished(page).startswith("Größe")
    page.click("text=Thoughts")
    assert page.locator(".thoughts p").inner_text() == "Well then."
    settings(page, max_thinking_tokens="99")
    reply_to(page, "Again")
    page.click("text=Continue")
    finished(page)
    asked = [(params.max_thinking_tokens, tokenizer_text) for ids, params in engine.asked
             for tokenizer_text in [served.tokenizer.decode(ids)]]
    assert [limit for limit, _ in asked] == [4, 16, None]
    assert ["Well then." in text for _, text in asked] == [False, False, True]


def test_an_error_after_a_long_paste_is_in_view_and_a_conversation_opens_at_its_end(page):
    ask(page, "word\n" * 600)
    for _ in range(2):
        page.wait_for_selector("#send:enabled")
        page.wait_for_selector(".fault >> text=Shorten it")
        end = page.locator("text=Try again").bounding_box()
        assert 0 < page.locator(".fault").bounding_box()["y"]
        assert end["y"] + end["height"] <= page.locator("#composer").bounding_box()["y"]
        page.reload()


@pytest.mark.parametrize("secure", [True, False])
def test_copy_copies_and_says_so(page, secure):
    reply_to(page, "Hello")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    if not secure:  # a page without TLS has no clipboard object
        page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    page.locator("text=Copy").last.click()
    page.wait_for_selector("text=Copied")
    page.focus("#message")
    page.keyboard.press("Control+V")
    assert page.input_value("#message").startswith(SAID)


def test_markdown_becomes_elements_whose_words_are_tokens_and_nothing_else_is_markup(
        page, engine, tokenizer, served):
    served.window, engine.said = 1000, tokenizer.encode(MARKDOWN)
    opened(page, page.url)
    settings(page, max_tokens=str(len(engine.said)))
    reply_to(page, "<script>document.title='run'</script>")
    assert {kind: page.locator(f".turn {kind}").count() for kind in SHOWN} == SHOWN
    assert page.locator(".reply pre").inner_text() == '    y = "<b>**raw**</b>"'
    assert page.locator(".reply > p").first.inner_text() == (
        "One bold both * a* link [bad](javascript:alert(1)) *x* a_b_c")
    assert page.title() == "tiny · FIRA"
    page.locator(".reply td strong span").click()
    assert page.locator("#token-text").inner_text() == "“2”"


def test_conversations_are_renamed_found_exported_and_imported(page, browser, tmp_path):
    turns = [{"role": "user", "text": "Old"}, {"role": "assistant", "text": "Words"}]
    old = json.dumps([{"id": "a-1", "title": "Old", "turns": turns}])  # as it was once stored
    page.evaluate("old => localStorage.setItem('fira.conversations', old)", old)
    page.reload()
    reply_to(page, "New words")
    page.on("dialog", lambda dialog: dialog.accept("A title"))
    page.hover("#conversations >> text=New words")
    page.click("[aria-label='Rename New words']")
    assert titles(page) == ["A title", "Old"]
    page.fill("#search", "NEW")
    assert titles(page) == ["A title"]
    with page.expect_download() as download:
        page.click("#export")
    download.value.save_as(tmp_path / "all.json")
    (tmp_path / "wrong.json").write_text('{"conversations": 1}')
    other = opened(browser.new_context().new_page(), page.url)
    for name, told in (("all", "2 new"), ("all", "0 new"), ("wrong", "Choose a file that Export")):
        other.set_input_files("#file", tmp_path / f"{name}.json")
        other.wait_for_selector(f"#notice >> text={told}")
        assert titles(other) == ["A title", "Old"]
    other.click("text=Old")
    assert other.locator(".reply").inner_text() == "Words"


def test_a_token_shows_its_details_and_every_control_has_a_name(page):
    reply_to(page, "Hello")
    page.locator(".reply span").first.click()
    assert page.locator("#probability").inner_text() == "probability 60.7 %, the likeliest token"
    assert page.locator("#alternatives li").count() == 8
    assert page.locator("#alternatives li.chosen").count() == 1
    assert page.locator("#map tr").count() == 2
    assert page.locator("#map td.routed").all_inner_texts() == ["1", "2", "1", "2"]
    assert page.locator("#chosen-experts").inner_text() == (
        "Layer 1: experts 1, 2\nLayer 2: experts 3, 4")
    page.locator("#map td").first.click()
    assert page.locator(".reply span.routed").count() == page.locator(".reply span").count()
    page.locator("#map td").nth(2).click()
    assert page.locator(".reply span.routed").count() == 0
    controls = "button, input, textarea, td, aside, nav, dialog"
    nameless = page.evaluate("""controls => [...document.querySelectorAll(controls)]
        .filter(e => !(e.ariaLabel || e.textContent.trim() || e.labels?.length
                       || e.getAttribute("aria-labelledby"))).map(e => e.outerHTML)""", controls)
    assert nameless == []


def test_keys_walk_through_tokens_and_map(page):
    reply_to(page, "Hello")
    page.focus(".reply")
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft"):
        page.keyboard.press(key)
    assert page.locator(".reply span.chosen").get_attribute("data-i") == "1"
    page.focus("#map td[tabindex='0']")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    chosen = page.locator("#map td[aria-selected=true]")
    assert chosen.get_attribute("aria-label").startswith("Layer 2, expert 2:")


def test_edited_and_regenerated_turns_are_versions_beside_the_old(page, engine):
    reply_to(page, "First")
    reply_to(page, "Second")
    page.locator("text=Regenerate").last.click()
    finished(page)
    assert page.locator(".turn").count() == 4
    page.locator("text=Edit").first.click()
    page.fill(".edit textarea", "Another")
    page.keyboard.press("Enter")
    finished(page)
    assert page.locator(".user .text").all_inner_texts() == ["Another"]
    page.locator("text=‹").first.click()
    assert page.locator(".user .text").all_inner_texts() == ["First", "Second"]
    assert page.locator(".version").all_inner_texts() == ["1 / 2", "2 / 2"]


def test_failures_are_told_and_can_be_tried_again(page, engine):
    engine.fault = "the accelerator ran out of memory"
    ask(page, "Hello")
    page.wait_for_selector("text=Try again")
    assert "the accelerator ran out of memory" in page.locator(".fault").inner_text()
    engine.fault = ""
    page.click("text=Try again")
    assert finished(page).startswith("Größe")
    assert page.locator(".fault").count() == 0


def test_an_old_conversation_drops_its_oldest_turns(page, engine, served):
    settings(page, max_tokens="100")
    for _ in range(3):
        reply_to(page, "word " * 10)
    assert "the oldest 4 messages were left out" in page.locator(".note").last.inner_text()
    assert len(engine.asked[-1][0]) + 100 <= served.window


def test_a_key_is_asked_for(browser, start, served, engine):
    running = start(lambda: (served, engine), keys=["sesame"])
    page = browser.new_page()
    page.goto(running.address)
    page.wait_for_selector("#settings[open]")
    page.fill("[name=key]", "sesame")
    page.click("#settings >> text=Save")
    page.wait_for_selector("#suggestions button")
    page.close()


def test_it_fits_a_phone(browser, running):
    page = opened(browser.new_page(viewport={"width": 360, "height": 640}), running.address)
    reply_to(page, "Hello")
    page.locator(".reply span").first.click()
    page.wait_for_selector("#alternatives li")
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= 360
    page.keyboard.press("Escape")
    page.click("#menu")
    assert page.locator("#list").is_visible()
    page.close()
