for (const button of document.querySelectorAll("button.copy")) {
  const code = button.parentElement.querySelector("code");
  button.hidden = false;
  button.addEventListener("click", async () => {
    getSelection().selectAllChildren(code);
    const write = navigator.clipboard ? navigator.clipboard.writeText(code.textContent) : Promise.reject();
    button.textContent = await write.then(() => "Copied", () => "Press Ctrl+C");
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
}
const wide = [...document.querySelectorAll(".scroll, figure:not(.gallery)")];
const mark = () => wide.forEach((box) => box.classList.toggle("more", box.scrollWidth > box.clientWidth + 1));
addEventListener("resize", mark);
addEventListener("load", mark);
mark();
