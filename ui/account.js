// Shows in the header who is logged in, with a button to log out, and tells when the session has ended.
// Without accounts it does nothing.
(async function () {
  const ask = window.fetch;
  const answer = await ask("/login/account");
  if (!answer.ok) return;
  const { account } = await answer.json();
  if (!account) return;

  function addButton() {
    const header = document.querySelector(".qd-header");
    if (!header || header.querySelector("#logout")) return;
    const form = document.createElement("form");
    form.method = "post";
    form.action = "/logout";
    form.id = "logout";
    const button = document.createElement("button");
    button.type = "submit";
    button.className = "qd-button qd-secondary";
    button.textContent = "Log out";
    button.title = "Logged in as " + account;
    form.append(button);
    header.append(form);
  }
  addButton();
  new MutationObserver(addButton).observe(document.body, { childList: true, subtree: true });

  // The page stays as it is, so that nothing typed is lost: after a login in another tab it goes on.
  window.fetch = async function (...request) {
    const answer = await ask.apply(window, request);
    const told = document.getElementById("session-ended");
    if (answer.status === 401 && !told) {
      const notice = document.createElement("div");
      notice.id = "session-ended";
      notice.className = "qd-notice qd-warn";
      notice.setAttribute("role", "alert");
      notice.style.cssText = "position:fixed;inset:12px 12px auto;z-index:9999";
      const link = document.createElement("a");
      link.href = "/login";
      link.target = "_blank";
      link.textContent = "Log in again";
      notice.append("Your session has ended. ", link, " in another tab; this page then goes on.");
      document.body.append(notice);
    } else if (answer.ok && told) {
      told.remove();
    }
    return answer;
  };
})();
